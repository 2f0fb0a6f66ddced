"""Fidelity and diversity figures: pure functions on tensors, computed in float64, returned as floats."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance between the Gaussian fits of two sets of features.

    ``|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)`` with unbiased covariances (Heusel et al.,
    "GANs trained by a two time-scale update rule", Eq. 6; FID when the features are Inception's). The last trace is
    the nuclear norm of ``C_a^1/2 C_b^1/2``, which stays real and symmetric for singular covariances.

    Args:
        a: features [N, D].
        b: features [M, D].

    Raises:
        ValueError: other shapes, or fewer than 2 samples.
    """
    _same_width(a, b)
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a), _gaussian(b)
    cross = torch.linalg.matrix_norm(root_a @ root_b, ord="nuc")
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def pairwise_cosine_within_class(images: Tensor, labels: Tensor, center: Tensor) -> float:
    """Return the mean cosine between two different images of one class, after taking ``center`` away.

    Lower is more diverse. Mean over the pairs of a class, then over the classes that have at least 2 images; it is 1
    when a class has collapsed to one picture.

    Args:
        images: [N, ...], flattened inside.
        labels: class of each image [N].
        center: the mean image of a reference set, [...]: without it every pair looks alike, since images share
            their background.

    Raises:
        ValueError: shapes that do not go together, or no class with 2 images.
    """
    flat = images.double().flatten(1) - center.double().flatten()
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = []
    for rows in _classes(unit, labels):
        count = len(rows)
        cosines.append((rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1)))
    return float(torch.stack(cosines).mean())


def variance_within_class(images: Tensor, labels: Tensor) -> float:
    """Return the total variance (summed over elements, unbiased) around a class's mean, averaged over classes.

    Args:
        images: [N, ...], in the units of the result's square root.
        labels: class of each image [N].

    Raises:
        ValueError: shapes that do not go together, or no class with 2 images.
    """
    flat = images.double().flatten(1)
    return float(torch.stack([rows.var(0).sum() for rows in _classes(flat, labels)]).mean())


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Return the sliced 1-Wasserstein distance: the mean over random directions of that between the projections.

    Sets of different sizes are compared at the larger set's quantiles.

    Args:
        a: [N, ...], flattened inside.
        b: [M, ...].
        projections: number of directions, uniform on the sphere.
        seed: of the directions.

    Raises:
        ValueError: other shapes, or an empty set.
    """
    a, b = a.double().flatten(1), b.double().flatten(1)
    if a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"sets of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    sorted_a, sorted_b = (a @ directions).sort(dim=0).values, (b @ directions).sort(dim=0).values
    count = max(len(a), len(b))
    rank = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return float((_quantiles(sorted_a, rank) - _quantiles(sorted_b, rank)).abs().mean())


def mode_weights_tv(assigned: Tensor, weights: Tensor) -> float:
    """Return the total variation between the shares of samples per mode and the modes' true ``weights``.

    Args:
        assigned: index of each sample's mode [N], int; -1 for a sample of no mode, whose share is lost.
        weights: the modes' probabilities [K].

    Raises:
        ValueError: no samples.
    """
    if not len(assigned):
        raise ValueError("no samples to assign to modes")
    found = torch.bincount(assigned[assigned >= 0].long(), minlength=len(weights)).double() / len(assigned)
    stray = 1.0 - float(found.sum())
    return 0.5 * (float((found - weights.double()).abs().sum()) + stray)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of ``logits`` [N, K] that are largest at their label [N]."""
    return float((logits.argmax(1) == labels).double().mean())


def variance_ratio(a: Tensor, b: Tensor) -> float:
    """Return the total variance of ``a`` [N, ...] over that of ``b`` [M, ...], each around its own mean.

    Raises:
        ValueError: other shapes, or fewer than 2 samples.
    """
    _same_width(a.flatten(1), b.flatten(1))
    return float(a.double().var(0).sum() / b.double().var(0).sum())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and the symmetric root of the covariance [D, D]."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    return mean, (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _same_width(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or len(a) < 2 or len(b) < 2:
        raise ValueError(f"need [N, D] and [M, D] with N, M >= 2, got {tuple(a.shape)} and {tuple(b.shape)}")


def _classes(rows: Tensor, labels: Tensor) -> list[Tensor]:
    """Split ``rows`` [N, D] by label; classes with a single row are left out."""
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"{tuple(labels.shape)} labels for {rows.shape[0]} images")
    parts = [part for label in labels.unique() if len(part := rows[labels == label]) > 1]
    if not parts:
        raise ValueError("no class has 2 images")
    return parts


def _quantiles(ordered: Tensor, rank: Tensor) -> Tensor:
    """Read the columns of sorted ``ordered`` [N, P] at ``rank`` in (0, 1) by the empirical quantile function."""
    return ordered[(rank * len(ordered)).long().clamp_max(len(ordered) - 1)]
