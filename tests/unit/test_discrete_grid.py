"""Processes and samplers that count timesteps: held against diffusers' own schedulers, and what begins with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from raydmd.diffusion.random import Key, normal
from raydmd.diffusion.schedule import VariancePreserving
from raydmd.diffusion.solvers import euler_step
from raydmd.diffusion.times import step_grid
from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.diffusers.discrete_grid import discrete_grid
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS
from raydmd.objectives.distribution_matching import distribution_matching_gradient
from raydmd.sampling.noise import initial_noise
from raydmd.sampling.teacher import cut_grid, first_time, noise_at
from raydmd.serving.parts import TeacherSteps
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

BETAS: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
OWN: dict[Any, dict[str, Any]] = {  # what the schedulers have besides
    DDIMScheduler: dict(clip_sample=False),
    DDPMScheduler: dict(clip_sample=False),
    PNDMScheduler: dict(skip_prk_steps=True),
    EulerDiscreteScheduler: {},
    EulerAncestralDiscreteScheduler: {},
    DPMSolverMultistepScheduler: {},
}
SPACINGS = ("leading", "linspace", "trailing")


def written(scheduler: Any, folder: Path, **change: Any) -> Family:
    """Return SDXL's family with a scheduler beside the network."""
    scheduler.save_pretrained(folder / "scheduler")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return build_family("sdxl", str(folder))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", OWN)
def test_the_timesteps_are_the_schedulers(kind: Any, spacing: str, tmp_path: Path) -> None:
    for offset in (0, 1):
        scheduler = kind(**BETAS, **OWN[kind], timestep_spacing=spacing, steps_offset=offset)
        family = written(scheduler, tmp_path / str(offset))
        for steps in (1, 2, 3, 4, 7, 25, 30, 50, 500):
            scheduler.set_timesteps(steps)
            wanted = scheduler.timesteps.double()
            if kind is PNDMScheduler:  # which calls the network twice at the second
                wanted = torch.unique_consecutive(wanted)
            times = torch.tensor(family.teacher_times(steps), dtype=torch.float64)
            assert times[-1] == 0.0 and (times.diff() < 0).all()
            found = family.schedule.timestep_of(times[:-1])
            assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-4, (steps, found, wanted)
            if steps == 25:
                even = torch.tensor(step_grid(steps), dtype=torch.float64)[:-1]
                assert spacing == "trailing" or (family.schedule.timestep_of(even) - wanted).abs().max() > 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_levels_are_eulers(spacing: str, tmp_path: Path) -> None:
    """Between whole timesteps, which linspace has, diffusers takes sigma to be linear: we take log alpha^2 to be."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1)
    family = written(scheduler, tmp_path)
    for steps in (4, 25):
        scheduler.set_timesteps(steps)
        times = torch.tensor(family.teacher_times(steps)[:-1], dtype=torch.float64)
        ratio = family.schedule.sigma(times) / family.schedule.alpha(times) / scheduler.sigmas[:-1].double()
        assert (ratio - 1.0).abs().max() < 2e-4
        shifted = family.schedule.sigma(times - 1e-3) / family.schedule.alpha(times - 1e-3)
        assert (shifted / scheduler.sigmas[:-1].double() - 1.0).abs().max() > 2e-3  # one timestep off


PROCESSES = {
    "sd": (DDIMScheduler, BETAS),
    "ddpm": (DDPMScheduler, dict(beta_schedule="linear")),
    "zero terminal": (DDIMScheduler, {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    "short": (DDIMScheduler, {**BETAS, "num_train_timesteps": 100}),
    "trained": (DDIMScheduler, dict(num_train_timesteps=4, trained_betas=[0.1, 0.2, 0.1, 0.5])),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_process_is_the_schedulers(name: str, tmp_path: Path) -> None:
    kind, settings = PROCESSES[name]
    scheduler = kind(**settings)
    family = written(scheduler, tmp_path)
    t = family.schedule.time_of(torch.arange(len(scheduler.alphas_cumprod)))
    bars = scheduler.alphas_cumprod.double()
    assert torch.allclose(family.schedule.alpha(t).square(), bars, rtol=2e-4, atol=1e-7)
    assert torch.allclose(family.schedule.sigma(t).square(), 1 - bars, rtol=2e-4, atol=1e-7)
    off = family.schedule.alpha(t - 0.5 / len(t)).square()
    assert not torch.allclose(off, bars, rtol=2e-4, atol=1e-7)
    assert family.prediction == ("v" if name == "zero terminal" else "eps")


def test_what_the_network_predicts_is_the_schedulers(tmp_path: Path) -> None:
    for said, kind in (("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")):
        assert written(DDIMScheduler(**BETAS), tmp_path / said, prediction_type=said).prediction == kind
    with pytest.raises(UserError, match="no prediction_type 'velocity'"):
        assert written(DDIMScheduler(**BETAS), tmp_path, prediction_type="velocity").prediction
    with pytest.raises(UserError, match="epsilon does not go with rescale_betas_zero_snr"):
        assert written(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True), tmp_path).prediction


WRONG = [
    (EulerDiscreteScheduler, dict(use_karras_sigmas=True), "use_karras_sigmas True"),
    (EulerDiscreteScheduler, dict(interpolation_type="log_linear"), "interpolation_type 'log_linear'"),
    (EulerDiscreteScheduler, dict(final_sigmas_type="sigma_min"), "final_sigmas_type sigma_min"),
    (EulerDiscreteScheduler, dict(timestep_spacing="even"), "timestep_spacing 'even'"),
    (EulerDiscreteScheduler, dict(steps_offset=-1), "steps_offset -1"),
    (DPMSolverMultistepScheduler, dict(use_lu_lambdas=True), "use_lu_lambdas True"),
    (DPMSolverMultistepScheduler, dict(lambda_min_clipped=-5.1), "lambda_min_clipped -5.1"),
    (DPMSolverMultistepScheduler, dict(thresholding=True), "thresholding True"),
    (DDIMScheduler, dict(clip_sample=True), "clip_sample true"),
    (PNDMScheduler, dict(skip_prk_steps=False), "skip_prk_steps false"),
    (DDIMScheduler, dict(_class_name="LMSDiscreteScheduler"), "_class_name 'LMSDiscreteScheduler'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "message"), WRONG)
def test_a_sampler_that_is_not_followed_is_refused_by_name(
    kind: Any, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family = written(kind(**BETAS, **OWN[kind]), tmp_path, **change)
    with pytest.raises(UserError, match=message) as error:
        family.teacher_times(4)
    assert "\n" not in str(error.value) and "teacher.timestep_shift" in str(error.value)
    assert family.teacher_times(4, 2.0) == step_grid(4, 2.0)  # as the message says


OTHER = [
    (dict(_class_name="EDMEulerScheduler"), "a EDMEulerScheduler"),
    (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "a FlowMatchEulerDiscreteScheduler"),
    (dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "flow sigmas"),
    (dict(timestep_type="continuous"), "timestep_type continuous"),
    (dict(beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
    (dict(beta_end=2.0), "alphas_cumprod"),
]


@pytest.mark.parametrize(("change", "message"), OTHER)
def test_another_process_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    family = written(EulerDiscreteScheduler(**BETAS), tmp_path, **change)
    with pytest.raises(UserError, match=f"scheduler_config.json.*{message}") as error:
        assert family.schedule
    assert "\n" not in str(error.value)


def test_steps_that_the_process_does_not_have_are_refused() -> None:
    schedule = VariancePreserving.scaled_linear(steps=10)
    for kind, most in (("DDIMScheduler", 10), ("DPMSolverMultistepScheduler", 9)):
        grid = discrete_grid({"_class_name": kind, "clip_sample": False}, schedule)
        assert len(grid.timesteps(most)) == most
        for steps in (0, -1, most + 1):
            with pytest.raises(UserError, match=f"steps: {steps} is not possible, use 1 to {most}"):
                grid.timesteps(steps)
    grid = discrete_grid({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}, schedule)
    assert grid.timesteps(5) == [9.0, 7.0, 5.0, 3.0, 1.0]
    with pytest.raises(UserError, match="with steps_offset 1 the first timestep would be 10, .* is 9"):
        grid.timesteps(10)


def test_a_teacher_begins_at_its_own_grids_first_time(tmp_path: Path) -> None:
    """At 751 of 999 with 4 steps of ``leading``, with noise of that time's level; a step from 999 on is not made."""
    from test_every_family import recipe_of

    tiny = TINY_MODELS["sdxl"]
    folder = tiny.save(tmp_path)
    recipe = recipe_of(tiny, folder, "teacher.steps=4")
    family = tiny.build(folder)
    scorer = Scorer(recipe, family, family.load_teacher())
    conditions = family.conditions(tiny.rows(2))
    noise = initial_noise(family, 3, 0, 2)
    numbers = normal(Key(3, 0, "sample", 0), 0, 2, family.latent_shape)
    assert torch.equal(noise, numbers * float(family.schedule.sigma(1.0)))
    times = scorer.times(4)
    assert family.schedule.timestep_of(times[0]) == pytest.approx(751)

    def euler(x: torch.Tensor, times: list[float]) -> torch.Tensor:
        for t, t_next in zip(times, times[1:], strict=False):
            prediction = scorer.predict(x, torch.full((2,), t, dtype=torch.float64), conditions)
            x = euler_step(family.schedule, prediction, x, t, t_next, family.prediction)
        return x

    with torch.no_grad():
        wanted = euler(numbers * float(family.schedule.sigma(times[0])), times)
        wrong = euler(noise, cut_grid(times, 1.0))
    made = scorer.sample(noise, conditions, steps=4, method="euler")
    assert len(made) == 5 and torch.allclose(made[-1], wanted, atol=1e-5)
    assert (made[-1] - wrong).abs().max() > 1e-3
    with torch.no_grad():
        *_, last = TeacherSteps(scorer, 4).walk(noise, conditions, [])
    assert last.number == 4 and torch.allclose(last.latents, wanted, atol=1e-5)
    begun = scorer.sample(noise, conditions, steps=4, start=0.9, method="euler")
    assert len(begun) == 6 and torch.equal(begun[0], noise)  # latents of a time above are taken as they are


def test_where_only_noise_is_left(tmp_path: Path) -> None:
    """With zero terminal SNR the first step and the gradient are finite from v; eps, which is refused, gives none."""
    settings = {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    family = written(DDIMScheduler(**settings), tmp_path)
    schedule, t = family.schedule, torch.ones(2, dtype=torch.float64)
    assert float(schedule.alpha(1.0)) == 0.0 and float(schedule.sigma(1.0)) == 1.0
    x_s, noise, real, fake = torch.randn(4, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    x_t = schedule.diffuse(x_s, noise, t)
    assert torch.allclose(x_t, noise, atol=1e-6)
    for weight in ("normalized", "raw", "sigma_over_alpha", "sigma_cubed_over_alpha"):
        gradient, broken = distribution_matching_gradient(schedule, x_s, x_t, real, fake, t, 0.0, "v", weight)
        assert not broken.any() and gradient.isfinite().all()
        assert bool(gradient.any()) == (weight == "normalized")  # the others' weights are 0 there
    assert torch.allclose(euler_step(schedule, real, x_t, 1.0, 0.0, "v"), -real)
    assert distribution_matching_gradient(schedule, x_s, x_t, real, fake, t, 0.0, "eps")[1].all()


def test_what_begins_at_the_noisiest_time_is_untouched() -> None:
    for name in ("ring", "digits"):
        family = build_family(name)
        noise = initial_noise(family, 3, 0, 2)
        assert first_time(family, family.teacher_times(5)) == family.schedule.t_max
        assert first_time(family, [family.schedule.t_max - 1e-12, 0.0]) == family.schedule.t_max
        assert noise_at(family, noise, family.schedule.t_max) is noise
