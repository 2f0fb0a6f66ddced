"""Phased DMD: K experts on K subintervals, SGTS inside each (Phased DMD Sec. 2.3, Fig. 1d)."""

from raydmd.config.recipe import Method
from raydmd.sampling.grid import phase_grids
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 4, 2


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Give each expert its run of the step grid."""
    return [
        make_phase(method, k, grid, "sgts", t_max) for k, grid in enumerate(phase_grids(method, steps, count, t_max))
    ]
