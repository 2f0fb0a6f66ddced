"""Settings that leave nothing to train on, each number in its range: refused before a run, their neighbours not."""

import pytest
import torch

from raydmd.config.recipe import Recipe
from raydmd.diffusion.schedule import RectifiedFlow
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import plan_phases
from raydmd.objectives.distribution_matching import distribution_matching_gradient
from raydmd.objectives.guidance import guided
from raydmd.recipe_check import check
from raydmd.runs.run import recipe_family
from raydmd.sampling.limits import check_method

FIXED = "method.score_interval=fixed"
CASES = {  # what is set, what the error says, and the nearest that is allowed
    "a fixed time at a phase's end": (
        [FIXED, "method.fixed_t=0.5"], ["method.fixed_t: 0.5", "0.500", "phase 1"], [FIXED, "method.fixed_t=0.53"],
    ),
    "and a little above": (
        [FIXED, "method.fixed_t=0.515"], ["method.fixed_t: 0.515", "method.score_margin (0.02)", "phase 1"],
        [FIXED, "method.fixed_t=0.515", "method.score_margin=0.01"],
    ),
    "the end of a grid that is shifted": (
        [FIXED, "method.fixed_t=0.75", "method.timestep_shift=3"], ["method.fixed_t: 0.75"],
        [FIXED, "method.fixed_t=0.78", "method.timestep_shift=3"],
    ),
    "a weight of zero": (
        [FIXED, "method.fixed_t=1", "method.gradient_weight=raw"], ["method.fixed_t: at 1.0", "raw"],
        [FIXED, "method.fixed_t=1"],
    ),
    "no guidance, as others write it": (
        ["teacher.guidance_scale=0"], ["teacher.guidance_scale: 0", "without a prompt", "1 means", "Self-Forcing"],
        ["teacher.guidance_scale=1"],
    ),
    "less than none": (
        ["teacher.guidance_scale=0.5"], ["teacher.guidance_scale: 0.5"], ["teacher.guidance_scale=1.01"],
    ),
    "an interval without its law": (
        ["method.score_shift=1e16", "method.score_interval=disjoint"], ["method.score_shift: 1e+16", "phase 2"],
        ["method.score_shift=100", "method.score_interval=disjoint"],
    ),
    "and of the other law": (
        ["method.score_shift=1e-9", "method.score_distribution=logit_normal"], ["method.score_shift: 1e-09", "phase 1"],
        ["method.score_shift=0.2", "method.score_distribution=logit_normal"],
    ),
    "a step without length": (
        ["method.timestep_shift=1e9", "method.score_margin=0"], ["method.timestep_shift: 1e+09", "phase 1"],
        ["method.timestep_shift=12", "method.score_margin=0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_it_is_refused_in_a_line_and_its_neighbour_is_not(what: str, quick) -> None:
    wrong, words, right = CASES[what]
    with pytest.raises(UserError) as caught:
        check(quick("digits", *wrong))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value
    check(quick("digits", *right))


def test_guidance_below_1_is_nothing_where_there_are_no_prompts() -> None:
    recipe: Recipe = load_recipe("ring", ["teacher.guidance_scale=0"])
    check_method(recipe, recipe_family(recipe), plan_phases(recipe))


def test_what_is_refused_at_a_phases_end_has_no_gradient() -> None:
    """The reason: at t = s teacher and fake agree on x_s whatever they predict, so that a run would train nothing."""
    schedule = RectifiedFlow()
    x_s, teacher, fake = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def size(t: float) -> float:
        gradient, _ = distribution_matching_gradient(schedule, x_s, x_s, teacher, fake, t, 0.5, "flow")
        return float(gradient.abs().mean())

    assert size(0.5) < 1e-6 < 0.05 < size(0.6)
    end = plan_phases(load_recipe("ring", []))[0].end
    assert end == 0.5


def test_the_scale_of_others_is_ours_less_1() -> None:
    """Self-Forcing and CausVid: c + w (c - u)."""
    c, u = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for theirs in (0.0, 3.0):
        torch.testing.assert_close(guided(c, u, theirs + 1), c + theirs * (c - u))
        assert (guided(c, u, theirs) - (c + theirs * (c - u))).abs().max() > 0.1
