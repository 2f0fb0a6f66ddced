"""Metrics against analytic values; each check is also failed by a known wrong formula."""

import math

import pytest
import torch

from raydmd.evaluation import metrics


def gaussian(count: int, mean: float, std: float, dim: int = 3, seed: int = 0) -> torch.Tensor:
    """Samples whose empirical mean and covariance are exactly ``mean`` and ``std^2 I``."""
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (count - 1))
    return mean + std * torch.linalg.solve_triangular(root, x.T, upper=False).T


def test_frechet_distance_is_the_gaussians() -> None:
    a, b = gaussian(500, 0.0, 1.0), gaussian(300, 2.0, 3.0, seed=1)
    expected = 3 * (2.0**2 + (3.0 - 1.0) ** 2)  # isotropic: D (dm^2 + ds^2)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    # with tr(Ca Cb) in place of the root's trace the value would be another
    wrong = 3 * (4.0 + 1.0 + 9.0 - 2 * 9.0)
    assert abs(expected - wrong) > 1


def test_frechet_distance_knows_that_covariances_need_not_commute() -> None:
    a = gaussian(400, 0.0, 1.0, dim=2) * torch.tensor([1.0, 3.0])
    angle = math.pi / 4
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    b = a @ turn.T
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    product = torch.linalg.eigvals(ca @ cb).real.sqrt().sum()  # tr (Ca Cb)^1/2 by its eigenvalues
    expected = float(ca.trace() + cb.trace() - 2 * product)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    commuting = float((torch.linalg.eigvalsh(ca).sqrt() - torch.linalg.eigvalsh(cb).sqrt()).square().sum())
    assert expected > 0.5 > commuting  # the formula for commuting covariances says 0


def test_frechet_distance_with_dead_features() -> None:
    a = torch.cat([gaussian(100, 0.0, 1.0), torch.zeros(100, 5, dtype=torch.float64)], dim=1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet_distance(a[:3], a[:3] + 1.0) == pytest.approx(8.0, rel=1e-6)  # fewer samples than features
    with pytest.raises(ValueError, match="N, M >= 2"):
        metrics.frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match="N, M >= 2"):
        metrics.frechet_distance(a, a[:, :2])


def test_pairwise_cosine_counts_pairs_of_different_images_of_one_class() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    center = torch.zeros(2)
    # class 0: orthogonal, 0; class 1: pairs (-1, 1, -1) / 3; mean -1/6. With i = j counted it would be > 0.
    assert metrics.pairwise_cosine_within_class(images, labels, center) == pytest.approx(-1 / 6)
    assert metrics.pairwise_cosine_within_class(images + 5, labels, center + 5) == pytest.approx(-1 / 6)
    assert metrics.pairwise_cosine_within_class(images + 5, labels, center) > 0.9  # uncentred: all alike


def test_collapse_raises_cosine_and_lowers_variance() -> None:
    labels = torch.arange(4).repeat_interleave(50)
    images = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    collapsed = images[labels * 50].clone()
    center = images.mean(0)
    assert abs(metrics.pairwise_cosine_within_class(images, labels, center)) < 0.01
    assert metrics.pairwise_cosine_within_class(collapsed, labels, center) == pytest.approx(1.0)
    assert metrics.variance_within_class(collapsed, labels) == pytest.approx(0.0, abs=1e-12)
    assert metrics.variance_within_class(images, labels) == pytest.approx(64, rel=0.05)


def test_variance_within_class_leaves_out_variance_between_classes() -> None:
    images = torch.tensor([[0.0, 1.0], [2.0, 1.0], [100.0, 0.0], [104.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert metrics.variance_within_class(images, labels) == pytest.approx((2 + 8) / 2)
    assert float(images.var(0).sum()) > 1000  # negative control
    with pytest.raises(ValueError, match="no class"):
        metrics.variance_within_class(images, torch.arange(4))
    with pytest.raises(ValueError, match="labels"):
        metrics.variance_within_class(images, torch.arange(3))


def test_sliced_wasserstein_of_a_shift() -> None:
    a = gaussian(400, 0.0, 1.0, dim=2)
    shift = torch.tensor([3.0, 4.0])
    # |<shift, u>| over the circle: 5 * 2 / pi
    value = metrics.sliced_wasserstein(a, a + shift, projections=4096)
    assert value == pytest.approx(5 * 2 / math.pi, rel=0.02)
    assert metrics.sliced_wasserstein(a, a[torch.randperm(400)]) == pytest.approx(0.0, abs=1e-12)  # order is nothing
    unsorted = (a - a[torch.randperm(400, generator=torch.Generator().manual_seed(1))]).abs().mean()
    assert unsorted > 0.5  # negative control: the same without sorting
    assert metrics.sliced_wasserstein(a, a.repeat(3, 1)) == pytest.approx(0.0, abs=1e-12)  # sizes may differ
    assert metrics.sliced_wasserstein(a, a + shift, seed=1) == metrics.sliced_wasserstein(a, a + shift, seed=1)
    with pytest.raises(ValueError, match="compared"):
        metrics.sliced_wasserstein(a, torch.zeros(3, 5))


def test_mode_weights_tv() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2])
    assert metrics.mode_weights_tv(torch.tensor([0] * 5 + [1] * 3 + [2] * 2), weights) == pytest.approx(0.0, abs=1e-6)
    assert metrics.mode_weights_tv(torch.zeros(10, dtype=torch.long), weights) == pytest.approx(0.5)
    assert metrics.mode_weights_tv(torch.full((10,), -1), weights) == pytest.approx(1.0)  # all astray
    uniform = metrics.mode_weights_tv(torch.tensor([0] * 5 + [1] * 3 + [2] * 2), torch.full((3,), 1 / 3))
    assert uniform > 0.1  # negative control: unequal modes taken for equal
    with pytest.raises(ValueError, match="no samples"):
        metrics.mode_weights_tv(torch.zeros(0), weights)


def test_accuracy_and_variance_ratio() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert metrics.accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75
    a = gaussian(100, 7.0, 2.0)
    assert metrics.variance_ratio(a, gaussian(80, -1.0, 1.0)) == pytest.approx(4.0)
    assert metrics.variance_ratio(a + 50, a) == pytest.approx(1.0)  # a shifted mean is no variance
