"""Few-step DMD with stochastic gradient truncation: a random exit step, one call's graph (Phased DMD Sec. 2.2)."""

from raydmd.config.recipe import Method
from raydmd.sampling.grid import phase_grids
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 4, 1


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Return one phase whose rollouts leave at a random step, straight to t = 0."""
    (grid,) = phase_grids(method, steps, count, t_max)
    return [make_phase(method, 0, grid, "sgts", t_max)]
