"""The student's times: how many steps each phase makes and where one expert hands over to the next."""

from collections.abc import Sequence

from raydmd.config.recipe import MethodOptions
from raydmd.diffusion.times import shift_time, step_grid, unshift_time
from raydmd.errors import UserError

SAME = 1e-9  # times that differ by less are one


def count_steps(method: MethodOptions, usual: int) -> int:
    """Return the student's network calls: ``method.steps``, else as many as ``method.times`` has, else the usual.

    Raises:
        UserError: both are given, and differ.
    """
    if method.times is None:
        return method.steps or usual
    if method.steps not in (None, len(method.times)):
        raise UserError(f"method.steps: {method.steps} steps, but method.times has {len(method.times)}")
    return len(method.times)


def count_phases(method: MethodOptions, usual: int) -> int:
    """Return how many experts there are: ``method.phases``, else one more than ``method.boundaries``, else the usual.

    Raises:
        UserError: both are given, and do not go together.
    """
    if method.boundaries is None:
        return method.phases or usual
    count = len(method.boundaries) + 1
    if method.phases not in (None, count):
        raise UserError(f"method.boundaries: {len(method.boundaries)} of them make {count} phases, not {method.phases}")
    return count


def phase_grids(method: MethodOptions, steps: int, count: int, t_max: float) -> list[list[float]]:
    """Return each phase's falling times; the first begins at ``t_max``, each ends where the next begins, the last at 0.

    Without ``method.times`` the steps are even before the shift toward noise; without ``method.boundaries`` each phase
    has as many of them. With boundaries alone each phase's steps are even between its own two ends.

    Args:
        method: the recipe's section.
        steps: network calls in all, a multiple of ``count`` unless the times say where phases end.
        count: how many phases.
        t_max: the schedule's noisiest time.

    Raises:
        UserError: a boundary that is none of the times.
    """
    each, shift = steps // count, method.timestep_shift
    if method.boundaries is not None and method.times is None:
        ends = [1.0, *(unshift_time(t, shift) for t in method.boundaries), 0.0]
        return [
            [t_max * shift_time(high + (low - high) * i / each, shift) for i in range(each + 1)]
            for high, low in zip(ends, ends[1:], strict=False)
        ]
    grid = step_grid(steps, shift, t_max) if method.times is None else [t_max * t for t in (*method.times, 0.0)]
    if method.boundaries is None:
        cuts = [k * each for k in range(count + 1)]
    else:
        assert method.times is not None
        cuts = [0, *(_place(boundary, method.times) for boundary in method.boundaries), steps]
    return [grid[low : high + 1] for low, high in zip(cuts, cuts[1:], strict=False)]


def _place(boundary: float, times: Sequence[float]) -> int:
    number = min(range(len(times)), key=lambda i: abs(times[i] - boundary))
    if abs(times[number] - boundary) > SAME:
        raise UserError(f"method.boundaries: {boundary:g} is not one of method.times; the nearest is {times[number]:g}")
    return number
