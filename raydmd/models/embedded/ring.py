"""Points in one or two dimensions: a time-conditioned MLP, and the ring of Gaussians as a family."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.diffusion.schedule import RectifiedFlow
from raydmd.errors import UserError
from raydmd.models.base import Conditions, Denoiser, EmbeddedFamily


def time_features(t: Tensor, frequencies: Tensor) -> Tensor:
    """Return [B, 2 F] sines and cosines of ``t`` [B] times ``frequencies`` [F] (radians per unit of time), float32."""
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def geometric(low: float, high: float, count: int) -> Tensor:
    """Return ``count`` frequencies from ``high`` down to ``low``, geometrically spaced, float32."""
    return torch.exp(torch.linspace(math.log(high), math.log(low), count, dtype=torch.float64)).float()


class PointsMLP(Denoiser):
    """An MLP on (x, features of t): at the default 35.7k parameters. It takes no conditions.

    Args:
        dimensions: of the data.
        width: of the hidden layers.
        depth: number of hidden layers.
        features: sines and cosines of t (even).
        seed: of the initial weights; the global random state is left alone.
    """

    frequencies: Tensor

    def __init__(
        self, dimensions: int = 2, width: int = 128, depth: int = 3, features: int = 16, seed: int = 0
    ) -> None:
        super().__init__()
        if min(dimensions, width, depth, features) < 1 or features % 2:
            raise UserError(f"teacher.options: width {width}, depth {depth}, features {features} (even) are above 0")
        # A smooth network in t: wave lengths from about 4 units of time down to a tenth of one.
        self.register_buffer("frequencies", geometric(1.5, 64.0, features // 2), persistent=False)
        self.width = width
        sizes = [dimensions + features, *[width] * depth, dimensions]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict from ``latents`` [B, dimensions] at ``t`` [B]; ``conditions`` are not used."""
        x = torch.cat([latents, time_features(t, self.frequencies).to(latents.dtype)], dim=1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the hidden layers."""
        return {f"layers.{number}": layer for number, layer in enumerate(self.layers[:-1])}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width."""
        return (self.width,)

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Return a layer's output [B, width], activated."""
        return F.silu(output)


class RingFamily(EmbeddedFamily):
    """The unequal, off-centre ring of eight Gaussians (`raydmd.data.ring`): unconditional, rectified flow."""

    name: ClassVar[str] = "ring"
    defaults: ClassVar[Mapping[str, Any]] = {"width": 128, "depth": 3, "features": 16}
    meanings: ClassVar[Mapping[str, str]] = {
        "width": "of a hidden layer", "depth": "number of hidden layers", "features": "frequencies of the time",
    }  # fmt: skip

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        self.latent_shape = (2,)
        self.schedule = RectifiedFlow()
        self.lora_targets = [f"layers.{i}" for i in range(int(self.options["depth"]) + 1)]
        self.condition_columns = []

    def new_network(self, seed: int = 0) -> PointsMLP:
        """Build the untrained MLP of ``options``."""
        return PointsMLP(2, **self.options, seed=seed)

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return no conditions."""
        return {}

    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return no conditions."""
        return {}

    def decode(self, latents: Tensor) -> Tensor:
        """Return the points themselves."""
        return latents
