"""What an update needs of its peers, and a gradient sum in which nobody's order shows."""

import math
from typing import Protocol

import torch


class Collective(Protocol):
    """In-place reductions over the replicas of a trainer group."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over replicas, in place."""

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the element-wise largest over replicas, in place."""


class Alone:
    """The collective of a single replica."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor``."""
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor``."""
        return tensor


def exact_sum(gradients: list[torch.Tensor], like: torch.Tensor, count: int, collective: Collective) -> torch.Tensor:
    """Sum the gradients of a batch's micro-batches; the result has the same bits however they are shared out.

    Each is rounded to int64 at one power-of-two scale, set by the largest element of all (an all-reduced
    maximum), and integer addition is associative. An element keeps all 24 bits of its float32 where it is at least
    2^-(38 - ceil log2 count) of the power of two at or below the largest; one below that is rounded to a grid of
    2^-(61 - ceil log2 count) of it. A batch of a single micro-batch is passed on unrounded.

    Args:
        gradients: this replica's micro-batches' flat gradients, float32 [N] each; may be none.
        like: a tensor of the result's shape, dtype and device.
        count: micro-batches of the global batch, over all replicas.
        collective: how to reduce over replicas.

    Raises:
        FloatingPointError: an element is infinite or not a number.
    """
    if count == 1:  # one replica has it, the others add zeros
        return collective.sum_(gradients[0] if gradients else torch.zeros_like(like))
    largest = torch.zeros((), dtype=torch.float64, device=like.device)
    for gradient in gradients:
        largest = torch.maximum(largest, torch.linalg.vector_norm(gradient, math.inf).double())
    largest.nan_to_num_(nan=math.inf, posinf=math.inf)  # a maximum over replicas can lose a NaN
    peak = float(collective.max_(largest))
    if not math.isfinite(peak):
        raise FloatingPointError("a gradient is not finite")
    scale = math.ldexp(1.0, 62 - math.ceil(math.log2(count)) - math.frexp(peak)[1])
    total = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    for gradient in gradients:
        total += gradient.double().mul_(scale).round_().to(torch.int64)
    return collective.sum_(total).double().div_(scale).to(like.dtype)
