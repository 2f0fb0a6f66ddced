"""Few-step DMD with stochastic gradient truncation: a random exit step, one call's graph (Phased DMD Sec. 2.2)."""

from raydmd.config.recipe import Method
from raydmd.diffusion.times import step_grid
from raydmd.sampling.phase import Phase, make_phase

STEPS, PHASES = 4, 1


def phases(method: Method, steps: int, count: int, t_max: float) -> list[Phase]:
    """Return one phase whose rollouts leave at a random step, straight to t = 0."""
    return [make_phase(method, 0, step_grid(steps, method.timestep_shift, t_max), "sgts", t_max)]
