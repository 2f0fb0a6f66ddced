"""What roles hand each other: a micro-batch's tensors, with the names and versions they were made under."""

from dataclasses import dataclass, field

import torch

from raydmd.config.recipe import Recipe
from raydmd.models.base import Conditions


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch's place in the global batch."""

    index: int
    start: int
    count: int


@dataclass(frozen=True)
class PromptBatch:
    """What a micro-batch is prompted with.

    Attributes:
        start: index of its first sample in the global batch.
        count: its samples.
        conditions: of each sample, [count, ...] by name.
    """

    start: int
    count: int
    conditions: Conditions


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


@dataclass(frozen=True)
class Stepped:
    """A proposal after a step of a probability-flow ODE: ``x`` [B, ...] at ``t`` [B] (float64)."""

    batch_id: BatchId
    x: torch.Tensor
    t: torch.Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Restored:
    """The generator's x_0 [B, ...] from the teacher's ODE pairs, noised, and the teacher's own."""

    batch_id: BatchId
    x: torch.Tensor
    real: torch.Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Cotangents:
    """The derivative of a loss of each sample by tensors that roles have made or are to differentiate through.

    Attributes:
        batch_id: of the proposal.
        role: who has worked it out.
        values: like the tensors [B, ...], by name: ``x_t`` of the proposal, ``x_s`` of the generator's samples, ``x``
            of a step's end, or a role's name for its prediction.
    """

    batch_id: BatchId
    role: str
    values: dict[str, torch.Tensor]


@dataclass(frozen=True)
class UpdateStats:
    """Figures of one update of a trained role.

    Attributes:
        norm: the gradient's, before clipping.
        micro: per micro-batch of this replica's: its start, and its figures by name.
        version: updates made with it.
        zeroed: samples of this replica's that were left out, their gradient not being finite, by the role that made
            them.
        lr: its learning rate; None: the part does not say.
    """

    norm: float
    micro: list[tuple[int, dict[str, float]]]
    version: int
    zeroed: dict[str, int] = field(default_factory=dict)
    lr: float | None = None


def micro_batches(recipe: Recipe) -> list[MicroBatch]:
    """Cut the global batch as the recipe says."""
    size = recipe.batch.micro or recipe.batch.size
    return [MicroBatch(index, index * size, size) for index in range(recipe.batch.micros)]
