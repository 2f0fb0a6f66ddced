"""Pretrained teachers that diffusers loads: one file a family, and what their folders must hold."""

import logging

REMARKS = ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that warn, where torchao is installed and diffusers is imported, of parts of it that are not used here."""

for name in REMARKS:
    logging.getLogger(name).setLevel(logging.ERROR)
