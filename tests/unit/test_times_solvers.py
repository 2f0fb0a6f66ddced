import math
from collections.abc import Callable

import pytest
import torch
from closed_form import OFF_CENTRE, Mixture, as_prediction
from diffusers import DDIMScheduler
from scipy import stats

from raydmd.diffusion.schedule import EDM, RectifiedFlow, Schedule, VariancePreserving
from raydmd.diffusion.solvers import euler_step, integrate, renoise_step
from raydmd.diffusion.times import sample_times, shift_time, step_grid, unshift_time
from raydmd.errors import UserError


@pytest.mark.parametrize(
    ("shift", "grid"),
    [
        (1.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (3.0, [1.0, 0.9, 0.75, 0.5, 0.0]),
        (5.0, [1.0, 0.9375, 0.8333, 0.625, 0.0]),
        (7.0, [1.0, 0.9545, 0.875, 0.7, 0.0]),
    ],
)
def test_step_grid_of_the_papers(shift: float, grid: list[float]) -> None:
    assert step_grid(4, shift) == pytest.approx(grid, abs=5e-5)
    assert step_grid(4, shift, t_max=80.0) == pytest.approx([80 * t for t in grid], abs=5e-3)
    # Shifting twice, the usual slip, gives other times.
    assert shift == 1.0 or max(abs(shift_time(t, shift) - t) for t in grid) > 0.1


def test_shift_is_undone_and_divides_alpha_over_sigma() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, 5.0)
    torch.testing.assert_close(unshift_time(shifted, 5.0), t, rtol=0, atol=1e-14)
    inner, moved = t[1:-1], shifted[1:-1]
    torch.testing.assert_close((1 - moved) / moved, (1 - inner) / inner / 5.0)
    assert shift_time(0.5, 3.0) == 0.75 and unshift_time(0.75, 3.0) == 0.5


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 1.0), (0.25, 0.6)])
def test_sampled_times_follow_the_law_kept_to_the_interval(
    distribution: str, shift: float, low: float, high: float
) -> None:
    """Against plain rejection: draw from the whole law, keep what falls inside."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(200_000, generator=generator, dtype=torch.float64)
    if distribution == "logit_normal":
        whole = torch.sigmoid(torch.randn(200_000, generator=generator, dtype=torch.float64))
    whole = shift * whole / (1 + (shift - 1) * whole)
    kept = whole[(whole > low) & (whole <= high)]
    u = torch.rand(20_000, generator=generator, dtype=torch.float64)
    t = sample_times(u, low, high, shift, distribution)
    assert t.dtype == torch.float64 and float(t.min()) > low and float(t.max()) <= high
    assert stats.ks_2samp(t.numpy(), kept.numpy()).pvalue > 0.01
    if (shift, distribution) != (1.0, "uniform"):
        evenly = low + u * (high - low)
        assert stats.ks_2samp(evenly.numpy(), kept.numpy()).pvalue < 1e-6


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_sampled_times_keep_the_margin_and_rise_with_u(distribution: str) -> None:
    u = torch.tensor([0.0, 1e-300, 0.1, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    t = sample_times(u, 0.875, 1.0, 5.0, distribution, margin=0.01)
    assert float(t[0]) > 0.885 and (t[2:] > t[1:-1]).all() and float(t[-1]) <= 1.0
    t = sample_times(u, 0.3, 0.7, 5.0, distribution)
    assert float(t[0]) > 0.3  # not s itself, even at u = 0
    assert RectifiedFlow().bridge(0.3, t).sigma.isfinite().all()
    edm = sample_times(u, 20.0, 80.0, 1.0, distribution, t_max=80.0)
    assert float(edm.min()) > 20.0 and 79.0 < float(edm.max()) <= 80.0


def test_times_that_cannot_be_are_refused() -> None:
    u = torch.zeros(1, dtype=torch.float64)
    for low, high, margin in ((0.5, 0.5, 0.0), (0.5, 0.6, 0.1), (-0.1, 0.5, 0.0), (0.5, 1.5, 0.0)):
        with pytest.raises(UserError, match="interval"):
            sample_times(u, low, high, margin=margin)
    with pytest.raises(UserError, match="logit_normal"):
        sample_times(u, 0.0, 1.0, distribution="logitnormal")
    with pytest.raises(UserError, match="steps"):
        step_grid(0)
    with pytest.raises(UserError, match="shift"):
        step_grid(4, 0.0)


def test_euler_step_is_euler_on_the_flow() -> None:
    torch.manual_seed(0)
    x, flow = torch.randn(2, 6, 3, dtype=torch.float64)
    t = torch.linspace(0.3, 1.0, 6, dtype=torch.float64)
    for t_next in (0.25, 0.0):
        step = euler_step(RectifiedFlow(), flow, x, t, t_next, "flow")
        torch.testing.assert_close(step, x + (t_next - t)[:, None] * flow, rtol=0, atol=1e-14)
    assert torch.equal(euler_step(RectifiedFlow(), x, flow, t, 0.0, "x0"), x)


def test_euler_step_is_ddim() -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ddim = DDIMScheduler(**config, clip_sample=False, prediction_type="v_prediction", timestep_spacing="leading")
    ddim.set_timesteps(10)
    schedule = VariancePreserving.from_diffusers(ddim.config)
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 3)
    for timestep, after in zip(ddim.timesteps[:-1], ddim.timesteps[1:], strict=True):
        ours = euler_step(schedule, v, x, schedule.time_of(timestep), schedule.time_of(after), "v")
        torch.testing.assert_close(ours, ddim.step(v, timestep, x).prev_sample, rtol=0, atol=2e-5)
        wrong = euler_step(schedule, v, x, schedule.time_of(timestep), schedule.time_of(after), "flow")
        assert (wrong - ours).abs().max() > 0.01


def test_renoise_step_forgets_the_old_noise() -> None:
    torch.manual_seed(0)
    schedule, (x, flow, noise) = RectifiedFlow(), torch.randn(3, 5, 2, dtype=torch.float64)
    step = renoise_step(schedule, flow, x, 0.8, 0.3, "flow", noise)
    torch.testing.assert_close(step, 0.7 * (x - 0.8 * flow) + 0.3 * noise, rtol=0, atol=1e-14)
    end = renoise_step(schedule, flow, x, 0.8, 0.0, "flow", noise)
    torch.testing.assert_close(end, euler_step(schedule, flow, x, 0.8, 0.0, "flow"), rtol=0, atol=1e-14)
    assert (step - euler_step(schedule, flow, x, 0.8, 0.3, "flow")).abs().max() > 0.1


def exact_denoiser(schedule: Schedule, data: Mixture, kind: str) -> Callable[[torch.Tensor, float], torch.Tensor]:
    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        x0 = data.mean_x0(x[:, 0], a, s)[:, None]
        return as_prediction(kind, x0, (x - a * x0) / s, a, s)

    return denoise


@pytest.mark.parametrize("kind", ["flow", "v", "x0"])
@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (RectifiedFlow(), (1.0, 0.1)),
        (VariancePreserving.linear(beta_start=0.02, beta_end=0.08, steps=100), (1.0, 0.1)),
        (EDM(4.0), (4.0, 0.4)),
    ],
    ids=["flow", "variance-preserving", "edm"],
)
def test_the_ode_carries_a_gaussian_and_heun_is_of_second_order(
    schedule: Schedule, ends: tuple[float, float], kind: str
) -> None:
    data = Mixture((1.0,), (1.5,), (0.6,))
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def truth(t: float) -> torch.Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return 1.5 * a + (0.36 * a**2 + s**2).sqrt() * z

    def error(method: str, steps: int) -> float:
        times = [ends[0] + (ends[1] - ends[0]) * i / steps for i in range(steps + 1)]
        states = integrate(schedule, exact_denoiser(schedule, data, kind), truth(ends[0]), times, kind, method)
        assert states.shape == (steps + 1, 9, 1) and torch.equal(states[0], truth(ends[0]))
        return float((states[-1] - truth(ends[1])).abs().max())

    euler, heun = error("euler", 40) / error("euler", 80), error("heun", 40) / error("heun", 80)
    assert 1.7 < euler < 2.3 and 3.4 < heun < 4.6
    assert error("heun", 80) < 0.05 * error("euler", 80)


def test_the_ode_ends_at_clean_data() -> None:
    schedule = RectifiedFlow()
    noise = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in ("flow", "x0", "eps"):
        start = 1.0 if kind != "eps" else 0.999
        times = [start * (1 - i / 50) for i in range(51)]
        x = integrate(schedule, exact_denoiser(schedule, OFF_CENTRE, kind), noise, times, kind)[-1]
        assert x.isfinite().all()
        mean = sum(w * m for w, m in zip(OFF_CENTRE.weights, OFF_CENTRE.means, strict=True))
        square = sum(w * (m * m + d * d) for w, m, d in zip(*vars(OFF_CENTRE).values(), strict=True))
        assert float(x.mean()) == pytest.approx(mean, abs=0.03)
        assert float(x.std()) == pytest.approx(math.sqrt(square - mean**2), rel=0.02)
