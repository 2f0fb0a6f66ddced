"""Settings that leave nothing to train on: refused before a run, though each of their numbers is in its range."""

from collections.abc import Sequence
from itertools import pairwise

from raydmd.config.recipe import MethodOptions, Recipe
from raydmd.diffusion.times import interval_share
from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations

LEAST_SHARE = 1e-6  # of the law of t: what a phase's interval needs to have
LEAST_STEP = 1e-4  # of the time axis: a step of the student


def check_method(recipe: Recipe, family: Family, phases: Sequence[Phase]) -> None:
    """Refuse a method that trains nothing, or on something else than the teacher.

    Args:
        recipe: the run's recipe.
        family: the recipe's.
        phases: its method's.

    Raises:
        UserError: guidance below 1, or of two networks where there is one, a rescaling that the family has not, times
            of the scores at or near a phase's end, a weight that is zero, steps that are none, and what
            `plan_iterations` refuses.
    """
    scales, method, t_max = recipe.teacher.guidance_scales, recipe.method, family.schedule.t_max
    if len(scales) > 1 and not family.two_guidance_scales:
        raise UserError(f"teacher.guidance_scale: two numbers are for a teacher of two networks (Wan 2.2 A14B); this "
                        f"one, of family '{family.name}', has one: give one number")  # fmt: skip
    if (scale := min(scales)) < 1 and family.condition_columns:
        of = "the teacher without a prompt" if scale == 0 else "a teacher between its prompt and none"
        raise UserError(
            f"teacher.guidance_scale: {scale:g} would distil {of}, since it is w in u + w (c - u); 1 means no guidance "
            f"(Self-Forcing and CausVid write c + w (c - u): their w is this one less 1, their 0 is 1 here)"
        )
    if recipe.teacher.guidance_rescale == "norm" and family.patches is None:
        raise UserError(f"teacher.guidance_rescale: norm is that of a token's prediction, and family '{family.name}' "
                        f"has no tokens")  # fmt: skip
    for phase in phases:
        for high, low in pairwise(phase.times):
            if high - low < LEAST_STEP * t_max:
                given = "method.times" if method.times else f"method.timestep_shift: {method.timestep_shift:g}"
                raise UserError(
                    f"{given} leaves nothing of phase {phase.index + 1}'s step from {high:.6g} to {low:.6g}"
                )
        _check_scores(method, phase, family)
    plan_iterations(recipe, phases)


def _check_scores(method: MethodOptions, phase: Phase, family: Family) -> None:
    """Refuse times of the scores at which a phase learns nothing."""
    number, margin = phase.index + 1, method.score_margin * phase.t_max
    if phase.score_low == phase.score_high:
        if phase.score_low <= phase.end + margin:
            raise UserError(
                f"method.fixed_t: {method.fixed_t} lies within method.score_margin ({method.score_margin}) of the end "
                f"{phase.end:.3f} of phase {number}"
            )
        if method.gradient_weight == "raw" and not float(family.schedule.alpha(phase.score_low)):
            raise UserError(
                f"method.fixed_t: at {method.fixed_t} only noise is left and method.gradient_weight: raw is 0 there; "
                f"choose a time below"
            )
        return
    share = interval_share(
        phase.score_low + margin, phase.score_high, method.score_shift, method.score_distribution, phase.t_max
    )
    if share < LEAST_SHARE:
        raise UserError(
            f"method.score_shift: {method.score_shift:g} leaves nothing of phase {number}'s interval "
            f"({phase.score_low:.3f}, {phase.score_high:.3f}): {share:.1g} of the law of t lies in it"
        )
