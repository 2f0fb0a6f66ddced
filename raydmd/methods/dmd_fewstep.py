"""Few-step DMD: the whole rollout is differentiated (Phased DMD Eq. 10, Fig. 1a)."""

from raydmd.config.recipe import Method
from raydmd.sampling.grid import phase_grids
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 4, 1


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Return one phase that keeps the graph of all its steps."""
    (grid,) = phase_grids(method, steps, count, t_max)
    return [make_phase(method, 0, grid, "vanilla", t_max)]
