"""Phased DMD: K experts on K subintervals, SGTS inside each (Phased DMD Sec. 2.3, Fig. 1d)."""

from raydmd.config.recipe import Method
from raydmd.diffusion.times import step_grid
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 4, 2


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Cut the step grid into ``count`` runs of equal length; each is one expert's."""
    grid, each = step_grid(steps, method.timestep_shift, t_max), steps // count
    return [make_phase(method, k, grid[k * each : (k + 1) * each + 1], "sgts", t_max) for k in range(count)]
