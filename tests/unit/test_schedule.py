from collections.abc import Mapping
from typing import Any

import pytest
import torch
from closed_form import OFF_CENTRE, POINTS, Mixture, as_prediction
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler

from raydmd.diffusion.schedule import EDM, RectifiedFlow, Schedule, VariancePreserving, broadcast
from raydmd.errors import UserError

SCHEDULES: dict[str, Schedule] = {
    "flow": RectifiedFlow(),
    "variance-preserving": VariancePreserving.scaled_linear(),
    "edm": EDM(80.0),
}
PREDICTIONS = ["flow", "eps", "x0", "v"]
QUANTITIES = [*PREDICTIONS, "score"]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


def pair(schedule: Schedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x0, eps = torch.randn(2, len(t), 3, 2, dtype=torch.float64)
    alpha, sigma = (c(t)[:, None, None] for c in (schedule.alpha, schedule.sigma))
    return x0, eps, alpha * x0 + sigma * eps


@pytest.mark.parametrize("source", QUANTITIES)
@pytest.mark.parametrize("target", QUANTITIES)
def test_conversions_round_trip(schedule: Schedule, source: str, target: str) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) * schedule.t_max
    x0, eps, x_t = pair(schedule, t)
    alpha, sigma = (c(t)[:, None, None] for c in (schedule.alpha, schedule.sigma))

    def known(kind: str) -> torch.Tensor:
        return -eps / sigma if kind == "score" else as_prediction(kind, x0, eps, alpha, sigma)

    there = schedule.convert(known(source), x_t, t, source, target)
    torch.testing.assert_close(there, known(target), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(schedule.convert(there, x_t, t, target, source), known(source), rtol=1e-9, atol=1e-9)


def test_the_flow_is_the_score_as_the_paper_has_it(schedule: Schedule) -> None:
    """Phased DMD Eq. 5: the flow is -x_t / alpha - (sigma + sigma^2 / alpha) score."""
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) * schedule.t_max
    _, eps, x_t = pair(schedule, t)
    a, s = (c(t)[:, None, None] for c in (schedule.alpha, schedule.sigma))
    score = -eps / s
    flow = schedule.convert(score, x_t, t, "score", "flow")
    torch.testing.assert_close(flow, -x_t / a - (s + s**2 / a) * score, rtol=1e-10, atol=1e-10)
    assert (flow - (-x_t / a - (s**2 / a) * score)).abs().max() > 0.1


@pytest.mark.parametrize("source", ["flow", "v", "x0"])
@pytest.mark.parametrize("target", QUANTITIES)
def test_flow_conversions_are_finite_at_pure_noise(source: str, target: str) -> None:
    schedule, t = RectifiedFlow(), torch.ones(1, dtype=torch.float64)
    x0, eps, x_t = pair(schedule, t)
    prediction = as_prediction(source, x0, eps, torch.zeros(()), torch.ones(()))
    if source == "v":  # v = -x_0 at t = 1
        torch.testing.assert_close(prediction, -x0)
    out = schedule.convert(prediction, x_t, t, source, target)
    expected = -eps if target == "score" else as_prediction(target, x0, eps, torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    # The score form, which divides by alpha, is not finite here.
    assert not ((x_t - eps) / schedule.alpha(1.0)).isfinite().any()


@pytest.mark.parametrize("source", ["flow", "v", "eps"])
def test_conversions_are_finite_at_clean_data(schedule: Schedule, source: str) -> None:
    t = torch.zeros(1, dtype=torch.float64)
    x0, eps, x_t = pair(schedule, t)
    prediction = as_prediction(source, x0, eps, torch.ones(()), torch.zeros(()))
    for target in PREDICTIONS:
        expected = as_prediction(target, x0, eps, torch.ones(()), torch.zeros(()))
        torch.testing.assert_close(schedule.convert(prediction, x_t, t, source, target), expected, rtol=0, atol=1e-12)


def test_unknown_kinds_are_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="velocity"):
        RectifiedFlow().convert(x, x, 0.5, "velocity", "eps")
    with pytest.raises(ValueError, match="velocity"):
        RectifiedFlow().convert(x, x, 0.5, "eps", "velocity")


def test_ends_and_falling_signal(schedule: Schedule) -> None:
    t = torch.linspace(0.0, schedule.t_max, 5001, dtype=torch.float64)
    snr = schedule.snr(t)
    assert float(schedule.alpha(0.0)) == 1.0 and float(schedule.sigma(0.0)) == 0.0
    assert snr[0].isinf() and (snr[1:] < snr[:-1]).all()
    assert schedule.alpha(0.5).dtype == schedule.sigma(0.5).dtype == torch.float64
    assert schedule.alpha(t).shape == t.shape


def test_bridge_composes(schedule: Schedule) -> None:
    """Diffusing 0 -> s -> t -> u has the law of 0 -> u."""
    s, t, u = (x * schedule.t_max for x in (0.2, 0.21, 0.9))
    first, second, whole = schedule.bridge(s, t), schedule.bridge(t, u), schedule.bridge(s, u)
    torch.testing.assert_close(first.alpha * second.alpha, whole.alpha, rtol=1e-12, atol=0)
    variance = (second.alpha * first.sigma).square() + second.sigma.square()
    torch.testing.assert_close(variance, whole.sigma.square(), rtol=1e-11, atol=0)
    from_data = schedule.bridge(0.0, t)
    assert float(from_data.alpha) == float(schedule.alpha(t)) and float(from_data.sigma) == float(schedule.sigma(t))
    variance = (first.alpha * schedule.sigma(s)).square() + first.sigma.square()
    torch.testing.assert_close(variance, schedule.sigma(t).square(), rtol=1e-12, atol=0)
    # Adding variances without alpha_{t|s} does not give it, but where alpha is 1 throughout: EDM hides that error.
    forgetful = (schedule.sigma(s).square() + first.sigma.square()).sqrt()
    assert (abs(float(forgetful - schedule.sigma(t))) > 1e-3) == (not isinstance(schedule, EDM))
    same = schedule.bridge(t, t)
    assert float(same.alpha) == 1.0 and float(same.sigma) == 0.0


def test_diffused_samples_have_the_law_of_one_step(schedule: Schedule) -> None:
    torch.manual_seed(0)
    s, t = 0.3 * schedule.t_max, 0.7 * schedule.t_max
    x0, e1, e2 = torch.randn(3, 200_000, 1, dtype=torch.float64)
    x_t = schedule.diffuse(schedule.diffuse(2.0 + 0.1 * x0, e1, s), e2, t, s)
    std = float((0.01 * schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).sqrt())
    assert abs(float(x_t.mean()) - 2.0 * float(schedule.alpha(t))) < 4 * std / x_t.numel() ** 0.5
    assert abs(float(x_t.std()) / std - 1.0) < 0.01


def test_times_of_a_batch_and_dtypes(schedule: Schedule) -> None:
    t = torch.tensor([0.2, 0.9], dtype=torch.float64) * schedule.t_max
    x, noise = torch.randn(2, 2, 3, 4, 4).bfloat16()
    out = schedule.diffuse(x, noise, t)
    assert out.dtype == torch.bfloat16
    for i in range(2):
        assert torch.equal(out[i : i + 1], schedule.diffuse(x[i : i + 1], noise[i : i + 1], float(t[i])))
        torch.testing.assert_close(
            out[i].float(),
            (float(schedule.alpha(t[i])) * x[i].float() + float(schedule.sigma(t[i])) * noise[i].float()),
            rtol=0.01,
            atol=0.01,
        )
    assert schedule.convert(x, out, t, "eps", "flow").dtype == torch.bfloat16
    assert schedule.posterior_mean(x.float(), out.float(), t, "eps", 0.1 * schedule.t_max).dtype == torch.float32
    assert broadcast(t, x).shape == (2, 1, 1, 1) and broadcast(t, x).dtype == torch.bfloat16


@pytest.mark.parametrize("data", [POINTS, OFF_CENTRE], ids=["points", "mixture"])
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("s", [0.0, 0.25, 0.5, 0.75])
def test_posterior_mean_in_closed_form(schedule: Schedule, data: Mixture, source: str, s: float) -> None:
    s *= schedule.t_max
    x_t = torch.linspace(-4, 5, 31, dtype=torch.float64) * max(1.0, schedule.t_max / 2)
    for t in (0.8 * schedule.t_max, schedule.t_max):
        if t == schedule.t_max and float(schedule.alpha(t)) == 0.0 and source == "eps":
            continue  # eps alone says nothing of x_0 there
        a_s, v_s, a_t, v_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
        x0 = data.mean_x0(x_t, a_t, v_t)
        prediction = as_prediction(source, x0, (x_t - a_t * x0) / v_t, a_t, v_t)
        mean = schedule.posterior_mean(prediction[:, None], x_t[:, None], t, source, s)[:, 0]
        expected = data.mean_x_s(x_t, a_s, v_s, a_t, v_t)
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
        if float(a_t) > 0.0:  # Tweedie's form, which divides by alpha_{t|s}
            bridge = schedule.bridge(s, t)
            tweedie = (x_t + bridge.sigma**2 * data.score(x_t, a_t, v_t)) / bridge.alpha
            torch.testing.assert_close(mean, tweedie, rtol=1e-7, atol=1e-7)
        if s > 0.0:
            # Going back by the deterministic step instead is another quantity.
            step = a_s * x0 + v_s * (x_t - a_t * x0) / v_t
            assert (step - expected).abs().max() > 0.05


CONFIGS: list[tuple[type, dict[str, Any]]] = [
    (DDPMScheduler, {}),
    (DDPMScheduler, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    (DDPMScheduler, {"num_train_timesteps": 50, "beta_end": 0.2}),
    (DDPMScheduler, {"trained_betas": [0.1, 0.2, 0.3, 0.4]}),
    (DDPMScheduler, {"rescale_betas_zero_snr": True}),
    (CogVideoXDDIMScheduler, {"snr_shift_scale": 3.0, "rescale_betas_zero_snr": True}),
    (CogVideoXDDIMScheduler, {"snr_shift_scale": 1.0}),
]


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_variance_preserving_hits_the_schedulers_alphas(kind: type, config: dict[str, Any]) -> None:
    scheduler = kind(**config)
    bars = scheduler.alphas_cumprod.double()
    full: Mapping[str, Any] = scheduler.config
    schedule = VariancePreserving.from_diffusers(full)
    timesteps = torch.arange(len(bars))
    t = schedule.time_of(timesteps)
    torch.testing.assert_close(schedule.alpha(t).square(), bars, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(schedule.sigma(t).square(), 1.0 - bars, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(schedule.timestep_of(t), timesteps.double(), rtol=0, atol=1e-9)
    assert (schedule.alpha(timesteps / len(bars)).square() - bars).abs().max() > 1e-3  # one entry off
    fine = schedule.snr(torch.linspace(0, 1, 7001, dtype=torch.float64))
    assert (fine[1:] < fine[:-1]).all() and float(schedule.sigma(1.0)) <= 1.0


def test_a_scheduler_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"beta_schedule: 'scaled-linear' .*'scaled_linear'"):
        VariancePreserving.from_diffusers({"beta_schedule": "scaled-linear"})
    with pytest.raises(UserError, match="fall strictly"):
        VariancePreserving(torch.tensor([0.9, 0.95, 0.5]))
    with pytest.raises(UserError, match="fall strictly"):
        VariancePreserving.from_betas(torch.tensor([0.0, 0.1]))
