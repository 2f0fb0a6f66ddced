"""Checks of a run's phases against each other, and how many updates each has."""

from collections.abc import Sequence

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.sampling.phase import Phase


def check_intervals(recipe: Recipe, phases: Sequence[Phase]) -> None:
    """Refuse phases whose scores have no time to be drawn at.

    Raises:
        UserError: a phase's interval of t is empty.
    """
    method = recipe.method
    for phase in phases:
        if phase.score_low == phase.score_high and phase.score_low <= phase.end:
            raise UserError(
                f"method.fixed_t: {method.fixed_t} is not above the end {phase.end:.3f} of phase {phase.index + 1}, "
                f"where nothing is noised and nothing learnt"
            )
        margin = method.score_margin * phase.t_max
        if phase.score_low != phase.score_high and phase.score_low + margin >= phase.score_high:
            raise UserError(
                f"method.score_margin: {method.score_margin} leaves nothing of phase {phase.index + 1}'s interval "
                f"({phase.score_low:.3f}, {phase.score_high:.3f})"
            )


def plan_iterations(recipe: Recipe, phases: Sequence[Phase]) -> list[int]:
    """Return the generator updates of each phase.

    Raises:
        UserError: a list of another length than there are phases, or fewer iterations than phases.
    """
    if isinstance(recipe.iterations, list):
        if len(recipe.iterations) != len(phases):
            raise UserError(f"iterations: {len(recipe.iterations)} numbers for {len(phases)} phases")
        return list(recipe.iterations)
    each, rest = divmod(recipe.iterations, len(phases))
    if not each:
        raise UserError(f"iterations: {recipe.iterations} are fewer than the {len(phases)} phases")
    return [each + (k < rest) for k in range(len(phases))]
