"""A teacher of two networks, one for much noise and one for little (Wan 2.2 A14B), as one denoiser."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydmd.models.base import Conditions, Denoiser
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.sampler_grid import TIMESTEPS
from raydmd.models.routing import Rows, by_part, rows_of

CLOSE = 1e-6  # of the time axis: an interval that ends so near the boundary ends on it


class TwoNetworkDenoiser(PretrainedDenoiser):
    """Each sample is scored by the network of its own t: the first at the boundary and above, the second below.

    A network that no sample of a batch needs is not called. The comparison is diffusers' own: the timestep, 1000 t in
    float32, with ``boundary_ratio`` times 1000.

    Args:
        high: for much noise; kept under its own part's name in the pipeline, as ``low`` is.
        low: for little noise, of the same kind.
        boundary: ``boundary_ratio`` of the pipeline, the time at which they change over.
    """

    def __init__(self, high: PretrainedDenoiser, low: PretrainedDenoiser, boundary: float) -> None:
        super().__init__(high.network, high.component)
        self.add_module(low.component, low.network)
        self.boundary = boundary
        self._parts = (high, low)  # in a tuple, so that their weights are not this module's twice

    @property
    def parts(self) -> Sequence[PretrainedDenoiser]:
        """The denoiser of each network."""
        return self._parts

    def part_of(self, t: Tensor) -> Tensor:
        """Return 0 for each sample of ``t`` [B] at the boundary or above, and 1 for each below; int64 [B]."""
        return (TIMESTEPS * t.to(torch.float32) < TIMESTEPS * self.boundary).long()

    def for_interval(self, high: float, low: float) -> Denoiser:
        """Return one of `parts` for times that lie on one side of the boundary, else itself.

        An interval that begins on the boundary is the second's, whole, though a single time there is the first's.
        """
        if low >= self.boundary - CLOSE:
            return self._parts[0].train(self.training)
        return self._parts[1].train(self.training) if high <= self.boundary + CLOSE else self

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict from ``latents`` [B, ...], each sample by its own network."""

        def call(part: int, rows: Rows) -> list[Tensor]:
            return [self._parts[part](latents[rows], t[rows], rows_of(conditions, rows))]

        return by_part(self.part_of(t), call)[0]

    def checkpoint_activations(self, run: Callable[..., Any]) -> bool:
        """Recompute each block of both in the backward pass."""
        return all([part.checkpoint_activations(run) for part in self._parts])

    @property
    def checkpointing(self) -> bool:
        """Whether blocks of both are recomputed in the backward pass."""
        return all(part.checkpointing for part in self._parts)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the first network's blocks; the second's have the same names (`raydmd.models.features`)."""
        return self._parts[0].feature_blocks()

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a block's features, the same for both."""
        return self._parts[0].feature_shape(latent_shape)
