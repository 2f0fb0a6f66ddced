"""The proof that the subinterval targets are unbiased, and that the paper's misprints are not.

Everything is exact, in float64. A target is affine in (x_s, eps), so its mean given x_t is the target at the means of
x_s and eps given x_t; those are known in closed form for mixtures (closed_form.py). The mean is what a squared loss
learns, and it must be the one that training on clean x_0 over the whole interval learns.
"""

from collections.abc import Callable

import pytest
import torch
from closed_form import OFF_CENTRE, POINTS, Mixture, as_prediction
from torch import Tensor

from raydmd.diffusion.schedule import EDM, RectifiedFlow, Schedule, VariancePreserving
from raydmd.objectives.score_matching import naive_target, score_matching_loss, subinterval_target

SCHEDULES: dict[str, Schedule] = {
    "flow": RectifiedFlow(),
    "variance-preserving": VariancePreserving.scaled_linear(),
    "edm": EDM(1.0),
}
PREDICTIONS = ["flow", "eps", "x0", "v"]
DATA = {"points": POINTS, "mixture": OFF_CENTRE}
X_T = torch.linspace(-3.5, 4.5, 41, dtype=torch.float64)


def times_after(s: float) -> list[float]:
    return [s + 0.001, s + 0.02, 0.5 * (s + 1), 0.97, 1.0]


def coefficients(schedule: Schedule, s: float, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """alpha_s, sigma_s, alpha_t, sigma_t, alpha_{t|s}, sigma_{t|s}, the last two from the definition."""
    a_s, v_s, a_t, v_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    ratio = a_t / a_s
    return a_s, v_s, a_t, v_t, ratio, (v_t**2 - ratio**2 * v_s**2).sqrt()


def given_x_t(schedule: Schedule, data: Mixture, s: float, t: float) -> tuple[Tensor, Tensor]:
    """E[x_s | x_t] and E[eps | x_t] of x_t = alpha_{t|s} x_s + sigma_{t|s} eps, [N, 1] each."""
    a_s, v_s, a_t, v_t, ratio, sigma = coefficients(schedule, s, t)
    x_s = data.mean_x_s(X_T, a_s, v_s, a_t, v_t)
    return x_s[:, None], ((X_T - ratio * x_s) / sigma)[:, None]


def full_interval_minimiser(schedule: Schedule, data: Mixture, t: float, prediction: str, x_t: Tensor = X_T) -> Tensor:
    """E[usual target | x_t] with x_0 known, [N, 1]."""
    a_t, v_t = schedule.alpha(t), schedule.sigma(t)
    x0 = data.mean_x0(x_t, a_t, v_t)
    return as_prediction(prediction, x0, (x_t - a_t * x0) / v_t, a_t, v_t)[:, None]


def deviation(
    target: Callable[[Schedule, Tensor, Tensor, float, float, str], Tensor],
    schedule: Schedule,
    data: Mixture,
    s: float,
    prediction: str,
) -> float:
    """The largest distance of a target's minimiser from the full interval's, over times and x_t."""
    worst = 0.0
    for t in times_after(s):
        x_s, eps = given_x_t(schedule, data, s, t)
        mean = target(schedule, x_s, eps, t, s, prediction)
        worst = max(worst, float((mean - full_interval_minimiser(schedule, data, t, prediction)).abs().max()))
    return worst


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("s", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_subinterval_target_has_the_full_intervals_minimiser(
    schedule: Schedule, data: Mixture, s: float, prediction: str
) -> None:
    assert deviation(subinterval_target, schedule, data, s, prediction) < 1e-10


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_targets_are_affine(schedule: Schedule, prediction: str) -> None:
    """What the proof rests on: the target at a mean is the mean of the targets."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 1000, 1, dtype=torch.float64)
    for target in (subinterval_target, naive_target):
        targets = target(schedule, x, noise, 0.8, 0.3, prediction)
        at_mean = target(schedule, x.mean(0, True), noise.mean(0, True), 0.8, 0.3, prediction)
        torch.testing.assert_close(targets.mean(0, True), at_mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_minimiser_holds_in_a_plain_average_over_samples(prediction: str) -> None:
    """No closed form of x_s given x_t: weigh simulated (x_0, x_s) by p(x_t | x_s), and compare at one x_t."""
    schedule, s, t, x_t = RectifiedFlow(), 0.4, 0.7, 1.5
    torch.manual_seed(0)
    x0 = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64).repeat(500_000)
    x_s = schedule.diffuse(x0[:, None], torch.randn(len(x0), 1, dtype=torch.float64), s)
    _, _, _, _, ratio, sigma = coefficients(schedule, s, t)
    eps = (x_t - ratio * x_s) / sigma
    weight = torch.softmax(-0.5 * eps[:, 0] ** 2, dim=0)[:, None]
    exact = float(full_interval_minimiser(schedule, POINTS, t, prediction, torch.tensor([x_t], dtype=torch.float64)))
    mean = float((weight * subinterval_target(schedule, x_s, eps, t, s, prediction)).sum())
    naive = float((weight * naive_target(schedule, x_s, eps, t, s, prediction)).sum())
    assert abs(mean - exact) < 0.01
    assert abs(naive - exact) > 0.05


# What the paper prints and what people write instead: each must fail the proof.


def eq_13_as_printed(schedule: Schedule, x_s: Tensor, eps: Tensor, t: float, s: float, prediction: str) -> Tensor:
    """The x_s term with the sign that Eq. 13 gives it."""
    a_s, v_s, a_t, v_t, _, sigma = coefficients(schedule, s, t)
    return (a_s**2 * v_t + a_t * v_s**2) / (a_s**2 * sigma) * eps + x_s / a_s


def eq_14_as_printed(schedule: Schedule, x_s: Tensor, eps: Tensor, t: float, s: float, prediction: str) -> Tensor:
    """Eq. 14's last line: 1 / sigma_s where 1 / alpha_s belongs."""
    a_s, v_s, a_t, v_t, _, sigma = coefficients(schedule, s, t)
    return (a_s**2 * v_t + a_t * v_s**2) / (a_s**2 * sigma) * eps - x_s / v_s


def eq_15_as_printed(schedule: Schedule, x_s: Tensor, eps: Tensor, t: float, s: float, prediction: str) -> Tensor:
    """Eq. 15's last line: alpha_s unsquared, and the sign of eps. (It prints sigma_{s|s}, which is 0; t|s is meant.)"""
    a_s, v_s, a_t, _, _, sigma = coefficients(schedule, s, t)
    return x_s / a_s + a_t * v_s**2 / (a_s * sigma) * eps


def eq_15_with_its_sign_mended(
    schedule: Schedule, x_s: Tensor, eps: Tensor, t: float, s: float, prediction: str
) -> Tensor:
    """Eq. 15's last line with the sign right and alpha_s still unsquared."""
    a_s, v_s, a_t, _, _, sigma = coefficients(schedule, s, t)
    return x_s / a_s - a_t * v_s**2 / (a_s * sigma) * eps


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("s", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("schedule", [SCHEDULES["flow"], SCHEDULES["variance-preserving"]], ids=["flow", "vp"])
def test_the_wrong_targets_fail_the_proof(schedule: Schedule, data: Mixture, s: float) -> None:
    for prediction in PREDICTIONS:
        assert deviation(naive_target, schedule, data, s, prediction) > 0.1
    assert deviation(eq_13_as_printed, schedule, data, s, "flow") > 1.0
    assert deviation(eq_15_as_printed, schedule, data, s, "x0") > 0.1
    assert deviation(eq_15_with_its_sign_mended, schedule, data, s, "x0") > 0.02
    if float(schedule.alpha(s)) == float(schedule.sigma(s)):
        # The middle of the flow cannot tell the two letters apart: never test there alone.
        assert deviation(eq_14_as_printed, schedule, data, s, "flow") < 1e-10
    else:
        assert deviation(eq_14_as_printed, schedule, data, s, "flow") > 0.5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_at_s_0_all_is_as_usual(schedule: Schedule, prediction: str) -> None:
    torch.manual_seed(0)
    x, noise, output = torch.randn(3, 5, 4, dtype=torch.float64)
    t = torch.tensor([1e-3, 0.02, 0.5, 0.9, 1.0], dtype=torch.float64)
    usual = as_prediction(prediction, x, noise, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None])
    for target in (subinterval_target, naive_target):
        torch.testing.assert_close(target(schedule, x, noise, t, 0.0, prediction), usual, rtol=0, atol=1e-12)
    plain = (output - usual).square().mean(1)
    for kind in ("subinterval", "naive"):
        loss = score_matching_loss(schedule, output, x, noise, t, 0.0, prediction, 10.0, kind)
        torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-12)
    in_32 = score_matching_loss(schedule, output.float(), x.float(), noise.float(), t, 0.0, prediction)
    torch.testing.assert_close(in_32, plain.float(), rtol=1e-4, atol=1e-4)
    off = score_matching_loss(schedule, output, x, noise, t, 0.0, prediction, None)
    torch.testing.assert_close(off, plain, rtol=1e-9, atol=1e-12)


def loss_gradient(output: Tensor, *rest: object, **options: object) -> Tensor:
    """The gradient of the summed loss with respect to the network's output."""
    output = output.clone().requires_grad_()
    score_matching_loss(SCHEDULES["flow"], output, *rest, **options).sum().backward()
    assert output.grad is not None
    return output.grad


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("clamp", [None, 10.0, 1.0, 0.1])
def test_the_stable_loss_is_least_at_the_true_minimiser(data: Mixture, prediction: str, clamp: float | None) -> None:
    """Its gradient is affine in (output, x_s, eps), so the mean gradient given x_t is the gradient at the means."""
    schedule = SCHEDULES["flow"]
    for s in (0.25, 0.5, 0.75):
        naive = 0.0
        for t in times_after(s):
            x_s, eps = given_x_t(schedule, data, s, t)
            best = full_interval_minimiser(schedule, data, t, prediction)
            args = (x_s, eps, t, s, prediction)
            assert loss_gradient(best, *args, clamp=clamp).abs().max() < 1e-9
            sigma = coefficients(schedule, s, t)[-1]
            weight = 1.0 if clamp is None else min(1.0, clamp * float(sigma) ** 2)
            # Elsewhere it pulls back, with the curvature of the weight alone.
            moved = loss_gradient(best + 0.1, *args, clamp=clamp)
            torch.testing.assert_close(moved, torch.full_like(moved, 0.2 * weight), rtol=1e-7, atol=1e-9)
            naive = max(naive, float(loss_gradient(best, *args, clamp=clamp, target="naive").abs().max()))
        assert naive > 0.1


def test_the_loss_is_quadratic_in_output_and_affine_in_gradient() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 8, 2, dtype=torch.float64)
    middle = loss_gradient(*((first + second) / 2), 0.8, 0.3, "flow")
    ends = (loss_gradient(*first, 0.8, 0.3, "flow") + loss_gradient(*second, 0.8, 0.3, "flow")) / 2
    torch.testing.assert_close(middle, ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clamp_only_weighs(prediction: str) -> None:
    schedule, s = SCHEDULES["flow"], 0.5
    t = torch.tensor([0.5001, 0.51, 0.55, 0.7, 1.0], dtype=torch.float64)
    sigma = schedule.bridge(s, t).sigma
    torch.manual_seed(0)
    for _ in range(3):  # whatever the output and the draw, the ratio is that of the weights
        output, x, noise = torch.randn(3, 5, 6, dtype=torch.float64)
        free = score_matching_loss(schedule, output, x, noise, t, s, prediction, None)
        target = subinterval_target(schedule, x, noise, t, s, prediction)
        torch.testing.assert_close(free, (output - target).square().mean(1), rtol=1e-9, atol=0)
        held = score_matching_loss(schedule, output, x, noise, t, s, prediction, 10.0)
        torch.testing.assert_close(held / free, (10 * sigma**2).clamp(max=1.0), rtol=1e-9, atol=0)


def test_the_clamp_tames_the_variance_near_s() -> None:
    """For t in [.5, .55] the mean square of the target is in the hundreds (and has no bound), at clamp 10 about 11."""
    schedule, s = SCHEDULES["flow"], 0.5
    torch.manual_seed(0)
    t = 0.5 + 0.05 * torch.rand(100_000, dtype=torch.float64)
    x0 = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64).repeat(25_000)[:, None]
    x_s, noise = schedule.diffuse(x0, torch.randn_like(x0), s), torch.randn_like(x0)
    free, held = (
        score_matching_loss(schedule, torch.zeros_like(x0), x_s, noise, t, s, "flow", clamp).mean()
        for clamp in (None, 10.0)
    )
    assert held < 15 < 8 * held < free
    # At s itself it is finite, since nothing divides by sigma_{t|s}; the target is not.
    at_s = score_matching_loss(schedule, torch.zeros_like(x0), x_s, noise, s, s, "flow")
    assert at_s.isfinite().all()
    assert not subinterval_target(schedule, x_s, noise, s, s, "flow").isfinite().any()


def test_shapes_dtypes_and_names() -> None:
    schedule, t = SCHEDULES["flow"], torch.tensor([0.6, 0.9])
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    loss = score_matching_loss(schedule, x, x, x, t, 0.5, "flow")
    assert loss.shape == (2,) and loss.dtype == torch.float32
    assert subinterval_target(schedule, x, x, t, 0.5, "flow").dtype == torch.bfloat16
    for call in (subinterval_target, naive_target):
        with pytest.raises(ValueError, match="velocity"):
            call(schedule, x, x, t, 0.5, "velocity")
    with pytest.raises(ValueError, match="biased"):
        score_matching_loss(schedule, x, x, x, t, 0.5, "flow", target="biased")
