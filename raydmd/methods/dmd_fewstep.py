"""Few-step DMD: the whole rollout is differentiated (Phased DMD Eq. 10, Fig. 1a)."""

from raydmd.config.recipe import Method
from raydmd.diffusion.times import step_grid
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 4, 1


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Return one phase that keeps the graph of all its steps."""
    return [make_phase(method, 0, step_grid(steps, method.timestep_shift, t_max), "vanilla", t_max)]
