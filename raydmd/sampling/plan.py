"""From a recipe to its phases: the only place that knows the methods' names."""

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError, nearest
from raydmd.methods import dmd, dmd_fewstep, dmd_sgts, phased
from raydmd.sampling.grid import count_phases, count_steps
from raydmd.sampling.phase import Phase

METHODS = {"dmd": dmd, "dmd-fewstep": dmd_fewstep, "dmd-sgts": dmd_sgts, "phased": phased}


def plan_phases(recipe: Recipe, t_max: float = 1.0) -> list[Phase]:
    """Return the recipe's phases in the order in which they are trained.

    Raises:
        UserError: an unknown method, or numbers that do not go with it.
    """
    method = recipe.method
    if method.name not in METHODS:
        raise UserError(f"method.name: no method '{method.name}'{nearest(method.name, METHODS)}")
    module = METHODS[method.name]
    steps, count = count_steps(method, module.STEPS), count_phases(method, module.PHASES)
    if method.name == "dmd" and steps != 1:
        raise UserError(f"method.steps: dmd has 1 step, not {steps}; for more, method.name: dmd-fewstep")
    if method.name != "phased" and count != 1:
        raise UserError(f"method.phases: {method.name} has 1 phase, not {count}; for more, method.name: phased")
    if steps % count and (method.times is None or method.boundaries is None):
        raise UserError(f"method.steps: {steps} steps do not divide into {count} phases")
    if method.regression.weight and method.name != "dmd":
        raise UserError(f"method.regression.weight: regression on ODE pairs goes with dmd, not {method.name}")
    phases = module.phases(method, steps, count, t_max)
    for phase in phases:
        if phase.score_low == phase.score_high and phase.score_low <= phase.end:
            raise UserError(
                f"method.fixed_t: {method.fixed_t} is not above the end {phase.end:.3f} of phase {phase.index + 1}, "
                f"where nothing is noised and nothing learnt"
            )
        if phase.score_low != phase.score_high and phase.score_low + method.score_margin * t_max >= phase.score_high:
            raise UserError(
                f"method.score_margin: {method.score_margin} leaves nothing of phase {phase.index + 1}'s interval "
                f"({phase.score_low:.3f}, {phase.score_high:.3f})"
            )
    return phases


def plan_iterations(recipe: Recipe, phases: list[Phase]) -> list[int]:
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
