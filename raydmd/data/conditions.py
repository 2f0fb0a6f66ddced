"""What a network is conditioned on."""

from torch import Tensor

Conditions = dict[str, Tensor]
"""Tensors by name, each with the batch first."""
