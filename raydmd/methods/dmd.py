"""DMD: one network call from noise to data (DMD Sec. 3), with or without regression on ODE pairs."""

from raydmd.config.recipe import Method
from raydmd.sampling.grid import phase_grids
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 1, 1


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Return the one phase of one step."""
    (grid,) = phase_grids(method, steps, count, t_max)
    return [make_phase(method, 0, grid, "vanilla", t_max)]
