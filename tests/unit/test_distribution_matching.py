from typing import Any

import pytest
import torch
from closed_form import Mixture, as_prediction
from torch import Tensor

from raydmd.diffusion.schedule import EDM, RectifiedFlow, Schedule, VariancePreserving
from raydmd.objectives.distribution_matching import (
    distribution_matching_gradient,
    raw_weight,
    surrogate_loss,
)
from raydmd.objectives.guidance import guided
from raydmd.objectives.regression import regression_loss

SCHEDULES: dict[str, Schedule] = {
    "flow": RectifiedFlow(),
    "variance-preserving": VariancePreserving.scaled_linear(),
    "edm": EDM(1.0),
}
PREDICTIONS = ["flow", "eps", "x0", "v"]
TEACHER = Mixture((1.0,), (1.5,), (0.7,))  # of x_0


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


def gradient_of(*arguments: Any) -> Tensor:
    """The gradient alone, without which samples were left out."""
    return distribution_matching_gradient(*arguments)[0]


def gaussian_score(x_t: Tensor, ratio: Tensor, sigma: Tensor, mean_s: Tensor, std_s: Tensor) -> Tensor:
    """The score at x_t of x_s ~ N(mean_s, std_s^2) diffused by (ratio, sigma)."""
    return (ratio * mean_s - x_t) / (ratio**2 * std_s**2 + sigma**2)


def from_score(kind: str, score: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """A prediction from the score, in the paper's terms (Phased DMD Eq. 5 and Eq. 15's first line)."""
    return as_prediction(kind, x_t / a + s**2 / a * score, -s * score, a, s)


class Case:
    """Generated x_s ~ N(mean, std^2) against the teacher's p(x_s), at one time t."""

    def __init__(self, schedule: Schedule, s: float, t: float, mean: float = -0.4, std: float = 0.5) -> None:
        self.schedule, self.s, self.t = schedule, s, t
        self.a, self.v = schedule.alpha(t), schedule.sigma(t)
        a_s, v_s = schedule.alpha(s), schedule.sigma(s)
        self.ratio = self.a / a_s
        self.sigma = (self.v**2 - self.ratio**2 * v_s**2).sqrt()
        self.teacher_mean, self.teacher_std = a_s * 1.5, (a_s**2 * 0.49 + v_s**2).sqrt()
        self.mean = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        self.std = torch.tensor(std, dtype=torch.float64, requires_grad=True)

    def scores(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's and the fake's."""
        return (
            gaussian_score(x_t, self.ratio, self.sigma, self.teacher_mean, self.teacher_std),
            gaussian_score(x_t, self.ratio, self.sigma, self.mean.detach(), self.std.detach()),
        )

    def gradient(self, x_s: Tensor, x_t: Tensor, kind: str, weight: str = "raw") -> Tensor:
        teacher, fake = (from_score(kind, score, x_t, self.a, self.v) for score in self.scores(x_t))
        return gradient_of(self.schedule, x_s, x_t, teacher, fake, self.t, self.s, kind, weight)

    def kl(self) -> Tensor:
        """KL(generated || teacher) of the diffused Gaussians, differentiable in mean and std."""
        p = self.ratio**2 * self.std**2 + self.sigma**2
        q = self.ratio**2 * self.teacher_std**2 + self.sigma**2
        gap = self.ratio * (self.mean - self.teacher_mean)
        return 0.5 * (p / q + gap**2 / q - 1.0 + (q / p).log())


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("s", [0.0, 0.25, 0.5, 0.75])
def test_raw_gradient_is_the_difference_of_scores(schedule: Schedule, kind: str, s: float) -> None:
    for t in (s + 0.02, 0.5 * (1 + s), 0.98):
        case = Case(schedule, s, t)
        x_t = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
        teacher, fake = case.scores(x_t)
        gradient = case.gradient(x_t, x_t, kind)
        torch.testing.assert_close(gradient, case.ratio * (fake - teacher), rtol=1e-9, atol=1e-10)
        # Eq. 11 to the letter.
        flows = [from_score("flow", score, x_t, case.a, case.v) for score in (teacher, fake)]
        letter = case.ratio / (case.v + case.v**2 / case.a) * (flows[0] - flows[1])
        torch.testing.assert_close(gradient, letter, rtol=1e-9, atol=1e-10)
        # The weight of Phased DMD's Eq. 9, with alpha_t for alpha_{t|s}, is another in a phase.
        assert torch.allclose(gradient, case.a * (fake - teacher)) == (s == 0.0 or isinstance(schedule, EDM))


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("s", [0.0, 0.25, 0.75])
def test_raw_gradient_is_that_of_the_kl(schedule: Schedule, kind: str, s: float) -> None:
    """With x_s = mean + std z: d KL / d mean = E[g], d KL / d std = E[g z]. g is affine in x_t, so both are exact."""
    case = Case(schedule, s, 0.5 * (1 + s))
    by_mean, by_std = torch.autograd.grad(case.kl(), (case.mean, case.std))
    mean, std = case.mean.detach(), case.std.detach()
    x_t = torch.stack([case.ratio * mean, case.ratio * mean + 1.0])[:, None]
    at_mean, above = case.gradient(x_t, x_t, kind)[:, 0]
    torch.testing.assert_close(at_mean, by_mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close((above - at_mean) * case.ratio * std, by_std, rtol=1e-9, atol=1e-10)
    assert by_mean < -0.01  # the generated mean lies below: going against the gradient raises it


@pytest.mark.parametrize("weight", ["raw", "normalized"])
@pytest.mark.parametrize("s", [0.0, 0.5])
def test_following_it_reaches_the_teacher(weight: str, s: float) -> None:
    case, generator = Case(SCHEDULES["flow"], s, 0.5), torch.Generator().manual_seed(0)
    mean, std = torch.tensor(-0.4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    for _ in range(400):
        z, e, u = (torch.randn(256, 1, dtype=torch.float64, generator=generator) for _ in range(3))
        t = float(s + 0.1 + (0.9 - s) * torch.sigmoid(u[0]))
        x_s = (mean + std * z).detach()
        case = Case(SCHEDULES["flow"], s, t, float(mean), float(std))
        gradient = case.gradient(x_s, case.ratio * x_s + case.sigma * e, "flow", weight)
        mean, std = mean - 0.05 * gradient.mean(), std - 0.05 * (gradient * z).mean()
    assert float(mean) == pytest.approx(float(case.teacher_mean), abs=0.1)
    assert float(std) == pytest.approx(float(case.teacher_std), abs=0.1)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("s", [0.0, 0.25, 0.75])
def test_normalized_gradient_in_closed_form(schedule: Schedule, kind: str, s: float) -> None:
    torch.manual_seed(0)
    case = Case(schedule, s, 0.5 * (1 + s))
    x_s = -0.4 + 0.5 * torch.randn(6, 5, dtype=torch.float64)
    x_t = case.ratio * x_s + case.sigma * torch.randn(6, 5, dtype=torch.float64)
    # The posterior mean of a Gaussian x_s, by the textbook: precision-weighted.
    means = []
    for m, d in ((case.teacher_mean, case.teacher_std), (case.mean.detach(), case.std.detach())):
        precision = case.ratio**2 / case.sigma**2
        means.append((m / d**2 + precision * x_t / case.ratio) / (1 / d**2 + precision))
    teacher, fake = means
    expected = (fake - teacher) / ((x_s - teacher).abs().mean(1, keepdim=True) + 1e-6)
    gradient = case.gradient(x_s, x_t, kind, "normalized")
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)
    # One mean for the whole batch, as is also found in the wild, is another gradient.
    whole_batch = (fake - teacher) / ((x_s - teacher).abs().mean() + 1e-6)
    assert (whole_batch - expected).abs().max() > 0.05
    # Same direction as the raw one, element by element.
    assert (torch.sign(gradient) == torch.sign(case.gradient(x_s, x_t, kind))).all()


def test_at_s_0_it_is_the_weight_of_dmds_code_and_eq_8_has_a_further_alpha(schedule: Schedule) -> None:
    torch.manual_seed(0)
    x, noise, real, fake = torch.randn(4, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    gradient = gradient_of(schedule, x, schedule.diffuse(x, noise, t), real, fake, t, 0.0, "x0")
    scale = (real - x).abs().sum(dim=(1, 2, 3), keepdim=True) / (2 * 4 * 4)
    torch.testing.assert_close(gradient, (fake - real) / scale, rtol=1e-5, atol=1e-6)
    assert (gradient - (real - fake) / scale).abs().max() > 1.0
    # Eq. 7 with Eq. 8's w_t, to the letter.
    a, v = (value.view(3, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
    x_t = schedule.diffuse(x, noise, t)
    scores = [(a * mean - x_t) / v**2 for mean in (fake, real)]
    letter = v**2 / a / scale * a * (scores[0] - scores[1])
    torch.testing.assert_close(letter, a * gradient, rtol=1e-5, atol=1e-6)
    assert torch.allclose(letter, gradient, rtol=1e-3) == isinstance(schedule, EDM)


@pytest.mark.parametrize("weight", ["raw", "normalized"])
def test_a_sample_does_not_feel_the_others(schedule: Schedule, weight: str) -> None:
    torch.manual_seed(0)
    x_s, x_t, teacher, fake = torch.randn(4, 5, 3, 2)
    t = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.9], dtype=torch.float64)

    def gradient(rows: slice, x: Tensor = x_s) -> Tensor:
        return gradient_of(schedule, x[rows], x_t[rows], teacher[rows], fake[rows], t[rows], 0.3, "flow", weight)

    whole = gradient(slice(None))
    for i in range(5):
        assert torch.equal(gradient(slice(i, i + 1)), whole[i : i + 1])
    far = x_s.clone()
    far[0] += 100.0
    assert torch.equal(gradient(slice(None), far)[1:], whole[1:])


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("weight", ["raw", "normalized"])
def test_it_is_zero_where_fake_and_teacher_agree(schedule: Schedule, kind: str, weight: str) -> None:
    x_s, x_t, teacher = torch.randn(3, 5, 3)
    args = (schedule, x_s, x_t, teacher)
    assert not gradient_of(*args, teacher.clone(), 0.7, 0.5, kind, weight).any()
    assert gradient_of(*args, teacher + 1, 0.7, 0.5, kind, weight).all()


@pytest.mark.parametrize("weight", ["raw", "normalized"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_it_is_finite_at_pure_noise(weight: str, kind: str) -> None:
    x_s, x_t, teacher, fake = torch.randn(4, 5, 3)
    for s in (0.0, 0.5):
        gradient = gradient_of(RectifiedFlow(), x_s, x_t, teacher, fake, 1.0, s, kind, weight)
        assert gradient.isfinite().all()
        if kind != "eps":  # eps alone says nothing of x_0 at t = 1: its gradient is 0 there
            assert bool(gradient.any()) == (weight == "normalized")
    assert float(raw_weight(RectifiedFlow(), 1.0, 0.5)) == 0.0


def test_a_spoilt_sample_is_zeroed_whole_and_alone() -> None:
    x_s, x_t, teacher, fake = torch.randn(4, 3, 4)
    clean = gradient_of(RectifiedFlow(), x_s, x_t, teacher, fake, 0.7, 0.5, "flow")
    fake[1, 2], teacher[2, 0] = float("nan"), float("inf")
    spoilt = gradient_of(RectifiedFlow(), x_s, x_t, teacher, fake, 0.7, 0.5, "flow")
    assert torch.equal(spoilt[0], clean[0]) and not spoilt[1:].any()


def test_dtype_is_float32_and_nothing_is_tracked() -> None:
    x_s = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    gradient = gradient_of(RectifiedFlow(), x_s, x_s, x_s + 1, x_s, 0.7, 0.5, "flow")
    assert gradient.dtype == torch.float32 and not gradient.requires_grad
    with pytest.raises(ValueError, match="eq8"):
        gradient_of(RectifiedFlow(), x_s, x_s, x_s, x_s, 0.7, 0.5, "flow", "eq8")


def test_guidance_scale_is_the_standard_one() -> None:
    torch.manual_seed(0)
    c, u = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(guided(c, u, 1.0), c)
    torch.testing.assert_close(guided(c, u, 0.0), u)
    torch.testing.assert_close(guided(c, u, 4.0), 4.0 * c - 3.0 * u)
    # c + w (c - u), the other convention in the wild: its 3 is our 4.
    other = c + 4.0 * (c - u)
    assert (guided(c, u, 4.0) - other).abs().max() > 0.1
    torch.testing.assert_close(guided(c, u, 4.0), c + 3.0 * (c - u))
    assert guided(c.bfloat16(), u.bfloat16(), 4.0).dtype == torch.float32


def test_surrogate_loss_has_the_given_gradient() -> None:
    torch.manual_seed(0)
    x_s, weights = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = surrogate_loss(x_s, weights)
    assert loss.shape == () and float(loss.detach()) == pytest.approx(0.5 * float(weights.square().mean()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, x_s)
    torch.testing.assert_close(gradient, weights / x_s.numel(), rtol=1e-5, atol=1e-7)
    # Through a network it is x_s.backward(gradient / numel).
    w = torch.randn(3, 3, requires_grad=True)
    z = torch.randn(4, 3)
    (by_loss,) = torch.autograd.grad(surrogate_loss(z @ w, weights), w)
    (direct,) = torch.autograd.grad(z @ w, w, weights / 12)
    torch.testing.assert_close(by_loss, direct, rtol=1e-4, atol=1e-6)
    half = surrogate_loss(x_s.bfloat16(), weights)
    assert half.dtype == torch.float32


def test_regression_loss_is_per_sample() -> None:
    student, teacher = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    student[1] = 2.0
    teacher[2, 0, 0] = 4.0
    assert torch.equal(regression_loss(student, teacher), torch.tensor([0.0, 4.0, 4.0]))
    assert regression_loss(student.bfloat16(), teacher).dtype == torch.float32
