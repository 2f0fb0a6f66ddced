"""What roles hand each other: a micro-batch's tensors, with the names and versions they were made under."""

from dataclasses import dataclass

import torch

from raydmd.models.base import Conditions


@dataclass(frozen=True)
class BatchId:
    """Names a micro-batch and says which weights made it.

    Attributes:
        phase: index of the phase.
        draw: number of the global batch in the run, ``iteration * (fake_updates + 1) + update``.
        start: index of its first sample in the global batch.
        generator_version: generator updates that had been made.
        fake_version: fake updates that had been made, -1 where the fake had no part.
    """

    phase: int
    draw: int
    start: int
    generator_version: int
    fake_version: int = -1


@dataclass(frozen=True)
class Samples:
    """Rollouts that end at the phase's s: ``x_s`` [B, ...] and what they were prompted with."""

    batch_id: BatchId
    x_s: torch.Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Noised:
    """A proposal for scoring: ``x_t`` [B, ...] at ``t`` [B] (float64)."""

    batch_id: BatchId
    x_t: torch.Tensor
    t: torch.Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Score:
    """A network's prediction on a proposal, [B, ...]."""

    batch_id: BatchId
    prediction: torch.Tensor
