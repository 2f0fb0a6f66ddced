"""Pixels seen by pretrained networks: LPIPS, and frozen backbones that a discriminator's heads read."""
