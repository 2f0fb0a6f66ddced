"""An unequal, off-centre ring of eight Gaussians in the plane, with all that is known of it in closed form.

Equal weights or a mean at the origin would hide faults: a wrong target of a phase's boundary cannot be told from
the right one on zero-mean, unit-variance data.
"""

import math

import torch
from torch import Tensor

from raydmd.diffusion.random import Key, normal, uniform

MODES = 8
RADIUS = 1.5
STD = 0.1
CENTRE = (1.0, -0.7)
WEIGHTS = (0.05, 0.20, 0.10, 0.15, 0.08, 0.17, 0.12, 0.13)


def mode_means() -> Tensor:
    """Return the modes' means, float64 [8, 2]: counter-clockwise from the right."""
    angle = torch.arange(MODES, dtype=torch.float64) * (2 * math.pi / MODES)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    return RADIUS * circle + torch.tensor(CENTRE, dtype=torch.float64)


def mode_weights() -> Tensor:
    """Return the modes' shares, float64 [8], which sum to 1."""
    return torch.tensor(WEIGHTS, dtype=torch.float64)


def sample(count: int, key: Key | int = 0, start: int = 0) -> Tensor:
    """Return ``count`` points, float32 [count, 2].

    Args:
        count: how many.
        key: a Key, or a seed from which one is made.
        start: number of the first; ``sample(8, key)[3:5]`` equals ``sample(2, key, start=3)``.
    """
    key = Key(key, 0, "ring", 0) if isinstance(key, int) else key
    u = uniform(Key(key.seed, key.phase, f"{key.stream}/mode", key.update), start, count)
    edges = mode_weights().cumsum(0)[:-1]
    mode = torch.searchsorted(edges, u, right=True)
    return mode_means().float()[mode] + STD * normal(key, start, count, (2,))


def nearest_mode(points: Tensor) -> Tensor:
    """Return the index of the mode nearest to each of ``points`` [N, 2], int64 [N]."""
    return torch.cdist(points.double(), mode_means().to(points.device)).argmin(dim=1)


def mode_shares(points: Tensor) -> Tensor:
    """Return the share of ``points`` [N, 2] nearest to each mode, float64 [8]."""
    return torch.bincount(nearest_mode(points), minlength=MODES).double() / max(len(points), 1)
