"""The methods held against the papers: phases, rollouts, sampling, the teacher's own path."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from raydmd.diffusion.random import Key, normal
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import plan_phases
from raydmd.runs.run import recipe_family
from raydmd.sampling.plan import plan_iterations
from raydmd.sampling.student import exit_step, rollout, sample_student, truncated
from raydmd.training.generator import Generator
from raydmd.training.messages import PromptBatch
from raydmd.training.preview import preview
from raydmd.training.teacher import Scorer

GRID4 = (1.0, 0.75, 0.5, 0.25, 0.0)


def phases_of(*overrides: str):
    return plan_phases(load_recipe("ring", list(overrides)))


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("overrides", "times", "gradients"),
    [
        (["method.name=dmd"], [(1.0, 0.0)], ["vanilla"]),
        (["method.name=dmd-fewstep"], [GRID4], ["vanilla"]),
        (["method.name=dmd-fewstep", "method.steps=2", "method.gradient=sgts"], [(1.0, 0.5, 0.0)], ["sgts"]),
        (["method.name=dmd-sgts"], [GRID4], ["sgts"]),
        (["method.name=phased"], [GRID4[:3], GRID4[2:]], ["sgts"] * 2),
        (["method.name=phased", "method.phases=4"], list(pairwise(GRID4)), ["sgts"] * 4),
        (["method.name=phased", "method.gradient=vanilla"], [GRID4[:3], GRID4[2:]], ["vanilla"] * 2),
        (["method.name=phased", "method.timestep_shift=5"], [(1.0, 0.9375, 5 / 6), (5 / 6, 0.625, 0.0)], ["sgts"] * 2),
        (["method.times=[1, .9375, .8333, .625]"], [(1.0, 0.9375, 0.8333), (0.8333, 0.625, 0.0)], ["sgts"] * 2),
        (["method.times=[1, .9, .5]", "method.boundaries=[.5]"], [(1.0, 0.9, 0.5), (0.5, 0.0)], ["sgts"] * 2),
        (["method.boundaries=[.875]"], [(1.0, 0.9375, 0.875), (0.875, 0.4375, 0.0)], ["sgts"] * 2),
        (["method.boundaries=[.8, .4]", "method.steps=3"], [(1.0, 0.8), (0.8, 0.4), (0.4, 0.0)], ["sgts"] * 3),
        (
            ["method.boundaries=[.875]", "method.timestep_shift=7"],  # .875 is .5 before the shift
            [(1.0, 5.25 / 5.5, 0.875), (0.875, 1.75 / 2.5, 0.0)],
            ["sgts"] * 2,
        ),
        (["method.name=dmd-sgts", "method.times=[1, .5]"], [(1.0, 0.5, 0.0)], ["sgts"]),
    ],
)
def test_the_phases_of_each_method(overrides: list[str], times: list[tuple[float, ...]], gradients: list[str]) -> None:
    phases = phases_of(*overrides)
    assert [phase.index for phase in phases] == list(range(len(times)))
    for phase, expected in zip(phases, times, strict=True):
        assert phase.times == pytest.approx(expected, abs=1e-12)
        assert phase.steps == len(expected) - 1 and phase.end == phase.times[-1]
        assert phase.score_low == phase.end and phase.score_high == 1.0  # nested: T(t; s, 1)
    assert [phase.gradient for phase in phases] == gradients
    assert phases[-1].end == 0.0


def test_given_times_are_shares_of_the_noisiest() -> None:
    recipe = load_recipe("ring", ["method.times=[1, .75, .5, .25]"])
    assert [p.times for p in plan_phases(recipe, 80.0)] == [(80, 60, 40), (40, 20, 0)]
    even = [p.times for p in plan_phases(load_recipe("ring", []), 80.0)]
    assert [p.times for p in plan_phases(recipe, 80.0)] == even  # to the bit


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.times=[.9, .5]", "method.times: it begins at 0.9, not at 1"),
        ("method.times=[1, .5, .6]", "method.times: 0.6 is not below 0.5"),
        ("method.times=[1, .5, .5]", "method.times: 0.5 is not below 0.5"),
        ("method.times=[1, 0]", "method.times: 0 is not below 0"),
        ("method.times=[1, -.5]", "method.times"),
        ("method.times=[]", "method.times"),
        ("method.boundaries=[1]", "method.boundaries: 1 is not below 1"),
        ("method.boundaries=[.5, .875]", "method.boundaries: 0.875 is not below 0.5"),
        (
            "method={name: phased, times: [1, .5], timestep_shift: 3}",
            "method.timestep_shift: method.times are taken as they are",
        ),
    ],
)
def test_times_out_of_order_are_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("ring", [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_intervals_that_scores_see() -> None:
    def intervals(*overrides: str) -> list[tuple[float, float]]:
        return [(p.score_low, p.score_high) for p in phases_of("method.name=phased", *overrides)]

    assert intervals() == [(0.5, 1.0), (0.0, 1.0)]
    assert intervals("method.score_interval=disjoint") == [(0.5, 1.0), (0.0, 0.5)]
    assert intervals("method.score_interval=fixed", "method.fixed_t=0.882") == [(0.882, 0.882)] * 2
    recipe = load_recipe("ring", ["method.name=phased"])
    assert [(p.score_low, p.score_high, p.times[0]) for p in plan_phases(recipe, 80.0)] == [(40, 80, 80), (0, 80, 40)]


def test_the_times_that_scores_see() -> None:
    recipe = load_recipe("ring", ["method.name=phased", "method.score_margin=0.02"])
    first, last = plan_phases(recipe)
    u = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    t = first.score_times(recipe.method, u)
    assert t.dtype == torch.float64 and float(t.min()) > 0.52 - 1e-12 and float(t.max()) <= 1.0
    assert torch.allclose(t, 0.52 + 0.48 * u)
    shifted = first.score_times(recipe.method.model_copy(update={"score_shift": 5.0}), u)
    assert float(shifted.mean()) > float(t.mean()) + 0.05 and float(shifted.min()) > 0.52 - 1e-12
    assert float(last.score_times(recipe.method, u).min()) < 0.03
    fixed = load_recipe("ring", ["method.score_interval=fixed", "method.fixed_t=0.6"])
    assert set(plan_phases(fixed)[0].score_times(fixed.method, u).tolist()) == {0.6}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.name=phasd"], ["method.name", "did you mean 'phased'"]),
        (["method.name=dmd", "method.steps=2"], ["method.steps", "1 step", "dmd-fewstep"]),
        (["method.name=dmd-sgts", "method.phases=2"], ["method.phases", "1 phase", "phased"]),
        (["method.steps=5"], ["method.steps", "5 steps", "2 phases"]),
        (["method.phases=8"], ["method.steps", "4 steps", "8 phases"]),
        (["method.name=dmd", "method.times=[1, .5]"], ["method.steps", "1 step", "dmd-fewstep"]),
        (["method.steps=3", "method.times=[1, .5]"], ["method.steps", "3 steps", "method.times has 2"]),
        (["method.times=[1, .5, .25]"], ["method.steps", "3 steps", "2 phases"]),
        (["method.phases=4", "method.boundaries=[.5]"], ["method.boundaries", "2 phases", "not 4"]),
        (["method.name=dmd-sgts", "method.boundaries=[.5]"], ["method.phases", "1 phase", "phased"]),
        (
            ["method.times=[1, .9375, .8333, .625]", "method.boundaries=[.875]"],
            ["method.boundaries", "0.875", "method.times", "0.8333"],
        ),
        (["method.name=dmd-sgts", "method.regression.weight=1"], ["method.regression.weight", "dmd-sgts"]),
        (["method.score_interval=fixed", "method.fixed_t=0.357"], ["method.fixed_t", "0.357", "0.500", "phase 1"]),
        (
            ["method.phases=4", "method.score_interval=disjoint", "method.score_margin=0.3"],
            ["method.score_margin", "phase 1", "(0.750, 1.000)"],
        ),
    ],
)
def test_numbers_that_do_not_go_with_the_method(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        phases_of(*overrides)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_iterations_are_shared_out() -> None:
    def shares(*overrides: str) -> list[int]:
        recipe = load_recipe("ring", list(overrides))
        return plan_iterations(recipe, plan_phases(recipe))

    assert shares("iterations=7") == [4, 3]
    assert shares("iterations=10", "method.phases=4") == [3, 3, 2, 2]
    assert shares("iterations=[2, 9]") == [2, 9]
    assert shares("iterations=7", "method.name=dmd") == [7]
    for wrong in ("iterations=[7]", "iterations=[]", "iterations=1"):
        with pytest.raises(UserError, match="^iterations: "):
            shares(wrong)


# ---------------------------------------------------------------- rollouts


@pytest.fixture
def ring(quick):
    """A generator of two phases of two steps on the ring, in its second phase, and its family."""
    recipe = quick("ring", "method.name=phased")
    family = recipe_family(recipe)
    generator = Generator(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max))
    generator.start_phase(0, 0)
    with torch.no_grad():  # experts that are neither equal nor the teacher
        generator.flat.weight += 0.05 * torch.randn(generator.flat.weight.shape, generator=torch.manual_seed(1))
    generator.start_phase(1, 2)
    return generator


def euler(x: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    return x + (t_next - t) * v


def at(t: float, count: int) -> Tensor:
    return torch.full((count,), t, dtype=torch.float64)


def test_a_rollout_is_the_experts_one_after_the_other(ring: Generator) -> None:
    key = Key(0, 1, "test", 0)
    made = rollout(ring.family, ring.experts, ring.phases, key, 0, {}, 8)
    x = normal(key, 0, 8, (2,))
    first, second = ring.experts.expert(0), ring.experts.expert(1)
    with torch.no_grad():
        for expert, t, t_next in ((first, 1.0, 0.75), (first, 0.75, 0.5), (second, 0.5, 0.25), (second, 0.25, 0.0)):
            x = euler(x, expert(x, at(t, 8), {}), t, t_next)
    assert torch.allclose(made, x, atol=1e-6) and not made.requires_grad
    wrong = rollout(ring.family, ring.experts, [replace(p, index=1) for p in ring.phases], key, 0, {}, 8)
    assert not torch.allclose(wrong, x, atol=1e-3)


def test_leaving_early_goes_straight_to_the_end(ring: Generator) -> None:
    phase = ring.phases[0]
    assert truncated(phase, 1) == (1.0, 0.5) and truncated(phase, 2) == phase.times == (1.0, 0.75, 0.5)
    key, expert = Key(0, 0, "test", 0), ring.experts.expert(0)
    x = normal(key, 0, 8, (2,))
    made = rollout(ring.family, ring.experts, [phase], key, 0, {}, 8, leave=1)
    with torch.no_grad():
        assert torch.allclose(made, euler(x, expert(x, at(1.0, 8), {}), 1.0, 0.5), atol=1e-6)
    assert not torch.allclose(made, rollout(ring.family, ring.experts, [phase], key, 0, {}, 8), atol=1e-3)


def gradient_of(generator: Generator, x: Tensor) -> Tensor:
    generator.flat.gradient.zero_()
    (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
    return generator.flat.gradient.clone()


def test_which_calls_keep_their_graph(ring: Generator) -> None:
    ring.start_phase(0, 0)
    with torch.no_grad():
        ring.flat.weight += 0.05 * torch.randn(ring.flat.weight.shape, generator=torch.manual_seed(1))
    key, expert, phase = Key(0, 0, "test", 3), ring.experts.expert(0), ring.phases[0]
    noise = normal(key, 0, 8, (2,))

    def by_hand(cut: bool) -> Tensor:
        x = euler(noise, expert(noise, at(1.0, 8), {}), 1.0, 0.75)
        x = x.detach() if cut else x
        return gradient_of(ring, euler(x, expert(x, at(0.75, 8), {}), 0.75, 0.5))

    def made(gradient: str, **options: int) -> Tensor:
        x = rollout(ring.family, ring.experts, [replace(phase, gradient=gradient)], key, 0, {}, 8, grad=True, **options)
        return gradient_of(ring, x)

    assert torch.allclose(made("sgts"), by_hand(cut=True), rtol=1e-4, atol=1e-5)
    assert torch.allclose(made("vanilla"), by_hand(cut=False), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_hand(cut=True), by_hand(cut=False), rtol=1e-2, atol=1e-2)
    early = gradient_of(ring, euler(noise, expert(noise, at(1.0, 8), {}), 1.0, 0.5))
    assert torch.allclose(made("sgts", leave=1), early, rtol=1e-4, atol=1e-5)


def test_an_earlier_expert_gets_no_gradient(ring: Generator) -> None:
    before = ring.experts.state(0)
    x = rollout(ring.family, ring.experts, ring.phases, Key(0, 1, "test", 0), 0, {}, 8, grad=True)
    assert gradient_of(ring, x).abs().sum() > 0
    earlier = list(ring.experts.expert(0).parameters())
    assert earlier and not any(p.requires_grad for p in earlier)
    for parameter in earlier:  # nor would it get one: its calls keep no graph
        parameter.requires_grad_(True).grad = None
    for leave in (1, 2):
        x = rollout(ring.family, ring.experts, ring.phases, Key(0, 1, "test", 0), 0, {}, 8, grad=True, leave=leave)
        gradient_of(ring, x)
        assert all(p.grad is None for p in earlier)
    trained = {id(p) for p in ring.experts.expert(1).parameters()}
    assert trained == {id(p) for p in ring.experts.trainable_parameters().values()}
    assert all(torch.equal(before[name], value) for name, value in ring.experts.state(0).items())


def test_renoising_takes_fresh_noise_of_its_own_key(ring: Generator) -> None:
    key, expert, phase = Key(5, 0, "test", 3), ring.experts.expert(0), ring.phases[0]
    made = rollout(ring.family, ring.experts, [phase], key, 4, {}, 8, solver="renoise")
    x = normal(key, 4, 8, (2,))
    with torch.no_grad():
        for number, (t, t_next) in enumerate(pairwise(phase.times), start=1):
            x0 = x - t * expert(x, at(t, 8), {})
            noise = normal(replace(key, stream=f"test/renoise-{number}"), 4, 8, (2,))
            x = (1 - t_next) * x0 + t_next * noise
    assert torch.allclose(made, x, atol=1e-6)
    parts = [
        rollout(ring.family, ring.experts, [phase], key, start, {}, 4, solver="renoise") for start in (4, 8)
    ]  # fmt: skip
    assert torch.allclose(torch.cat(parts), made, atol=1e-6)
    assert not torch.allclose(made, rollout(ring.family, ring.experts, [phase], key, 4, {}, 8), atol=1e-2)


def test_one_exit_step_for_the_whole_batch_and_another_for_the_next(ring: Generator) -> None:
    sgts = replace(ring.phases[0], gradient="sgts")
    drawn = [exit_step(sgts, Key(0, 0, "exit", draw)) for draw in range(200)]
    assert set(drawn) == {1, 2} and 60 < drawn.count(1) < 140
    assert exit_step(replace(sgts, gradient="vanilla"), Key(0, 0, "exit", 0)) == 2
    seen = set()
    for iteration in range(2, 8):
        draw = iteration * ring.draws
        leave = exit_step(ring.phase, Key(0, 1, "exit", draw))
        seen.add(leave)
        whole = rollout(
            ring.family, ring.experts, ring.phases, Key(0, 1, "rollout", draw), 0, {}, 16, leave=leave
        )  # fmt: skip
        parts = [ring.rollout(iteration, 0, PromptBatch(start, 4, {})) for start in (0, 4, 8, 12)]
        assert torch.allclose(torch.cat([part.x_s for part in parts]), whole, atol=1e-6)
        assert [part.batch_id.start for part in parts] == [0, 4, 8, 12]
        assert {(part.batch_id.draw, part.batch_id.generator_version, part.batch_id.phase) for part in parts} == {
            (draw, 2, 1)
        }
        again = ring.rollout(iteration, 0, PromptBatch(8, 4, {}))
        assert torch.equal(again.x_s, parts[2].x_s)
        assert not torch.allclose(ring.rollout(iteration, 1, PromptBatch(8, 4, {})).x_s, parts[2].x_s, atol=1e-2)
    assert seen == {1, 2}


@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_what_frozen_experts_contribute_can_be_made_ahead(quick, solver: str) -> None:
    def second_phase() -> Generator:
        recipe = quick("ring", "method.name=phased", f"method.solver={solver}")
        family = recipe_family(recipe)
        generator = Generator(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max))
        generator.start_phase(0, 0)
        generator.prepare(0, PromptBatch(0, 4, {}))  # nothing to do in the first phase
        generator.start_phase(1, 2)
        return generator

    plain, ahead = second_phase(), second_phase()
    for iteration in (2, 3):
        for start in (0, 4):
            ahead.prepare(iteration, *[PromptBatch(start, 4, {})] * 3)
    with torch.no_grad():  # they are not asked again
        for parameter in ahead.experts.expert(0).parameters():
            parameter.zero_()
    for iteration in (2, 3):
        for start in (4, 0):
            a, b = (each.rollout(iteration, 1, PromptBatch(start, 4, {})) for each in (plain, ahead))
            assert torch.equal(a.x_s, b.x_s) and a.batch_id == b.batch_id
            a, b = (each.propose(iteration, PromptBatch(start, 4, {})) for each in (plain, ahead))
            assert torch.equal(a.x_t, b.x_t) and a.batch_id == b.batch_id
            assert torch.equal(*(gradient_of(each, each._kept[start][0]) for each in (plain, ahead)))
    a, b = (each.rollout(2, 1, PromptBatch(0, 4, {})) for each in (plain, ahead))  # once used, it is gone
    assert not torch.allclose(a.x_s, b.x_s, atol=1e-2)


# ---------------------------------------------------------------- sampling


def test_a_sample_is_the_same_alone_and_in_any_batch(ring: Generator) -> None:
    many = sample_student(ring.family, ring.experts, ring.phases, {}, 8, seed=3)
    again = sample_student(ring.family, ring.experts, ring.phases, {}, 8, seed=3)
    assert torch.equal(many.latents, again.latents)
    one = sample_student(ring.family, ring.experts, ring.phases, {}, 1, seed=3, start=5)
    assert torch.allclose(one.latents[0], many.latents[5], atol=1e-5)
    assert not torch.allclose(one.latents[0], many.latents[4], atol=1e-2)
    other = sample_student(ring.family, ring.experts, ring.phases, {}, 8, seed=4)
    assert not torch.allclose(other.latents, many.latents, atol=1e-2)


def test_what_a_sample_came_by(ring: Generator) -> None:
    made = sample_student(ring.family, ring.experts, ring.phases, {}, 4, seed=3, start=2)
    assert [(expert, t) for expert, t, _ in made.path] == [(0, 1.0), (0, 0.75), (0, 0.5), (1, 0.25), (1, 0.0)]
    assert torch.equal(made.path[0][2], normal(Key(3, 0, "sample", 0), 2, 4, (2,)))
    assert [torch.equal(made.boundaries[i], made.path[j][2]) for i, j in ((0, 2), (1, 4))] == [True, True]
    assert torch.equal(made.latents, made.boundaries[-1]) and len(made.boundaries) == 2
    first = sample_student(ring.family, ring.experts, ring.phases[:1], {}, 4, seed=3, start=2)
    assert torch.equal(first.latents, made.boundaries[0])


def test_a_preview_shows_the_average_and_leaves_the_weights(ring: Generator) -> None:
    ring.flat.average.add_(0.05)
    weight, average = ring.flat.weight.data.clone(), ring.flat.average.clone()
    pictures = preview(ring, {}, 6)
    assert torch.equal(ring.flat.weight.data, weight) and torch.equal(ring.flat.average, average)
    ring.flat.swap_average()
    expected = sample_student(ring.family, ring.experts, ring.phases, {}, 6, seed=ring.recipe.seed).latents
    assert torch.allclose(pictures, expected, atol=1e-6)
    ring.flat.swap_average()
    ring.start_phase(0, 0)  # a phase that ends above 0 shows its prediction of x_0
    x = normal(Key(ring.recipe.seed, 0, "sample", 0), 0, 6, (2,))
    expert = ring.experts.expert(0)
    with torch.no_grad():
        x = euler(x, expert(x, at(1.0, 6), {}), 1.0, 0.75)
        x = euler(x, expert(x, at(0.75, 6), {}), 0.75, 0.0)
    assert torch.allclose(preview(ring, {}, 6), x, atol=1e-5)


def test_the_teacher_goes_on_from_where_x_is(quick) -> None:
    """Its own grid of 4 steps, cut at the start; Euler's steps by hand."""
    recipe = quick("ring")
    family = recipe_family(recipe)
    scorer, x = Scorer(recipe, family, family.load_teacher()), normal(Key(0, 0, "test", 0), 0, 8, (2,))
    for start, grid in ((None, GRID4), (0.6, (0.6, 0.5, 0.25, 0.0)), (0.5, (0.5, 0.25, 0.0))):
        path = scorer.sample(x, {}, steps=4, start=start, method="euler")
        assert path.shape == (len(grid), 8, 2) and torch.equal(path[0], x)
        at_hand = x
        for (t, t_next), state in zip(pairwise(grid), path[1:], strict=True):
            with torch.no_grad():
                at_hand = euler(at_hand, scorer.network(at_hand, at(t, 8), {}), t, t_next)
            assert torch.allclose(state, at_hand, atol=1e-5)
    heun = scorer.sample(x, {}, steps=4)
    assert heun.shape == (5, 8, 2) and not torch.allclose(heun[-1], scorer.sample(x, {}, steps=4, method="euler")[-1])
