"""Figures for points in the plane: how well samples cover the ring's modes and keep to them."""

from typing import Any

import torch
from torch import Tensor

from raydmd.data import ring
from raydmd.evaluation.metrics import mode_weights_tv, sliced_wasserstein

FOUND = 0.1


def ring_metrics(points: Tensor, data: Tensor) -> dict[str, Any]:
    """Return the figures of ``points`` [N, 2] on the ring of eight Gaussians; ``data`` [M, 2] is drawn from it.

    - ``modes``: modes whose share within 3 standard deviations is at least a tenth of what is true;
    - ``mode_tv``: total variation between the shares nearest to each mode and the true weights;
    - ``within_3_sigma``: share of the points within 3 standard deviations of a mode (the truth: .989);
    - ``spread``: standard deviation around the nearest mode among those points, over that of ``data``;
    - ``sliced_wasserstein``: distance to ``data``.
    """
    means, weights = ring.mode_means(), ring.mode_weights()
    nearest, inside = ring.nearest_mode(points), _inside(points, means)
    hits = torch.bincount(nearest[inside], minlength=len(weights)).double() / len(points)
    return {
        "modes": int((hits >= FOUND * weights).sum()),
        "mode_tv": mode_weights_tv(nearest, weights),
        "within_3_sigma": float(inside.double().mean()),
        "spread": _spread(points, means) / _spread(data, means),
        "sliced_wasserstein": sliced_wasserstein(points, data),
    }


def _inside(points: Tensor, means: Tensor) -> Tensor:
    return torch.cdist(points.double(), means).min(dim=1).values <= 3 * ring.STD


def _spread(points: Tensor, means: Tensor) -> float:
    """Return the standard deviation, an axis, around the nearest mode of the points within 3 sigma of it."""
    kept = points[_inside(points, means)].double()
    if not len(kept):
        return 0.0
    return float((kept - means[ring.nearest_mode(kept)]).square().mean().sqrt())
