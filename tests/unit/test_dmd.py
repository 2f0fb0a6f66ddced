"""DMD's own choices: the weights of its Table 2, T_max, the real score alone, reference samples in the matching."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import gradient_of_one_update, same
from torch import Tensor

from raydmd.diffusion.random import normal, uniform
from raydmd.diffusion.schedule import EDM, RectifiedFlow, Schedule, VariancePreserving
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import plan_phases
from raydmd.objectives.distribution_matching import distribution_matching_gradient, surrogate_loss
from raydmd.objectives.regression import regression_loss

SCHEDULES = [RectifiedFlow(), VariancePreserving.scaled_linear(), EDM(1.0)]
PAIRS = ["method.name=dmd", "method.regression.pairs=32", "batch.size=32", "batch.micro=16"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.3, 0.7)])
@pytest.mark.parametrize(("weight", "power"), [("sigma_over_alpha", 1), ("sigma_cubed_over_alpha", 3)])
def test_weights_of_other_papers(schedule: Schedule, s: float, t: float, weight: Any, power: int) -> None:
    """w_t alpha_{t|s} (score_fake - score_teacher) with w_t = sigma_t^power / alpha_t (DMD Table 2)."""
    x_s, x_t, teacher, fake = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, left_out = distribution_matching_gradient(
        schedule, x_s, x_t, teacher, fake, t, s, "score", weight=weight
    )  # fmt: skip
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    expected = sigma**power / alpha * float(schedule.bridge(s, t).alpha) * (fake - teacher)
    assert torch.allclose(found, expected, rtol=1e-9) and not left_out.any()
    assert not torch.allclose(found, expected * sigma / alpha, rtol=1e-2)
    assert not torch.allclose(found, -expected, rtol=1e-2)


def test_the_scores_t_ends_at_t_max(quick: Any) -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for share in (0.98, 0.5):
        recipe = quick("digits", "method.name=dmd", f"method.dmd.t_max={share}", "method.score_margin=0.02")
        (phase,) = plan_phases(recipe)
        t = phase.score_times(recipe.method, u)
        assert 0.02 <= float(t.min()) and float(t.max()) <= share and float(t.max()) > share - 0.01
        assert phase.times == (1.0, 0.0)  # the student begins where it did
    with pytest.raises(UserError, match=r"method\.score_margin"):
        plan_phases(load_recipe("digits", ["method.name=dmd", "method.dmd.t_max=0.01"]))


def test_the_real_score_alone(quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update follows -score_teacher, whatever the fake score says; with it, another."""
    options = [*PAIRS, "method.gradient_weight=raw"]
    alone, found = gradient_of_one_update(quick("digits", *options, "method.dmd.real_score_only=true"), prompts,
                                          monkeypatch)  # fmt: skip
    monkeypatch.undo()
    _, both = gradient_of_one_update(quick("digits", *options), prompts, monkeypatch)
    assert not same(found, both)

    def matching(x_s: Tensor, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
        schedule = alone.family.schedule
        teacher = alone.parts["teacher"].predict(x_t, t, conditions)
        score = schedule.convert(teacher, x_t, t, "flow", "score")
        return -schedule.bridge(0.0, t).alpha.reshape(-1, 1, 1, 1) * score

    assert same(found, by_samples(alone, matching, references=False))
    assert not same(found, by_samples(alone, lambda *given: -matching(*given), references=False))


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_reference_samples_are_matched_too(
    quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """KL over x and x_ref together, as a mean over both; the regression on x_ref alone (DMD Algorithm 1)."""
    options = [*PAIRS, f"method.regression.weight={weight}", "method.gradient_weight=raw"]
    run, found = gradient_of_one_update(quick("digits", *options, "method.dmd.reference_samples=true"), prompts,
                                        monkeypatch)  # fmt: skip

    def matching(x_s: Tensor, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
        predictions = (run.parts[role].predict(x_t, t, conditions).detach() for role in ("teacher", "fake"))
        return distribution_matching_gradient(run.family.schedule, x_s, x_t, *predictions, t, 0.0, "flow", "raw")[0]

    assert same(found, by_samples(run, matching, references=True, weight=weight))
    assert not same(found, by_samples(run, matching, references=False, weight=weight))
    if weight:
        assert not same(found, by_samples(run, matching, references=True, weight=2 * weight))


def by_samples(run: Any, matching: Callable[..., Tensor], references: bool, weight: float = 0.0) -> Tensor:
    """The generator's gradient in one process: each sample's matching gradient taken to the weights by autograd."""
    generator, family = run.parts["generator"], run.family
    generator.flat.gradient.zero_()
    for batch in run.prompts(0, run.method.recipe.method.fake_updates):
        samples = generator._samples(0, generator.draws - 1, batch, grad=True)
        batch_id, made = samples.batch_id, [(samples.x_s, samples.conditions, "score")]
        if references or weight:
            x_ref, target, on = generator.from_pairs(batch_id, batch.count)
        if references:
            made.append((x_ref, on.conditions, "reference"))
        gradients = []
        for x_s, conditions, stream in made:
            key = generator._key(f"{stream}-noise", batch_id.draw)
            noise = normal(key, batch.start, batch.count, family.latent_shape)
            u = uniform(generator._key(f"{stream}-t", batch_id.draw), batch.start, batch.count)
            t = generator.phase.score_times(run.method.recipe.method, u)
            x_t = family.schedule.diffuse(x_s.detach(), noise, t, 0.0)
            gradients.append(matching(x_s.detach(), x_t, t, conditions))
        share = 1 / run.method.recipe.batch.micros
        loss = surrogate_loss(torch.cat([x_s for x_s, _, _ in made]), torch.cat(gradients)) * share
        if weight:
            loss = loss + weight * share * regression_loss(x_ref, target).mean()
        loss.backward()
    return generator.flat.gradient.clone()
