"""Times: the shift toward noise, the grid that a few-step sampler visits, and the law that training draws from."""

import math
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from raydmd.errors import UserError, nearest

TimeLaw = Literal["uniform", "logit_normal"]
"""The law of t before the shift: uniform on [0, 1], or the sigmoid of a standard normal number."""


@overload
def shift_time(t: float, shift: float) -> float: ...
@overload
def shift_time(t: Tensor, shift: float) -> Tensor: ...
def shift_time(t: float | Tensor, shift: float) -> float | Tensor:
    """Shift times in [0, 1] toward noise: shift t / (1 + (shift - 1) t). The flow's alpha / sigma falls by shift."""
    return shift * t / (1.0 + (shift - 1.0) * t)


@overload
def unshift_time(t: float, shift: float) -> float: ...
@overload
def unshift_time(t: Tensor, shift: float) -> Tensor: ...
def unshift_time(t: float | Tensor, shift: float) -> float | Tensor:
    """Undo `shift_time`."""
    return t / (shift - (shift - 1.0) * t)


def step_grid(steps: int, shift: float = 1.0, t_max: float = 1.0) -> list[float]:
    """The steps + 1 falling times [t_max, ..., 0] of a sampler; 4 steps at shift 5 give 1, .9375, .8333, .625, 0.

    Raises UserError if steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise UserError(f"steps: {steps} is not possible, use 1 or more")
    if shift <= 0.0:
        raise UserError(f"shift: {shift} is not possible, use a positive number (1 leaves the times alone)")
    return [t_max * shift_time(1.0 - i / steps, shift) for i in range(steps + 1)]


def _cumulative(t: float, shift: float, distribution: TimeLaw) -> float:
    plain = unshift_time(t, shift)
    if distribution == "uniform":
        return plain
    if plain <= 0.0 or plain >= 1.0:
        return 0.0 if plain <= 0.0 else 1.0
    return 0.5 * math.erfc(-math.log(plain / (1.0 - plain)) / math.sqrt(2.0))


def interval_share(
    low: float, high: float, shift: float = 1.0, distribution: TimeLaw = "uniform", t_max: float = 1.0
) -> float:
    """The share, 0 to 1, of the shifted law of t that lies between low and high, in the schedule's units."""
    below_high = 1.0 if high >= t_max else _cumulative(high / t_max, shift, distribution)
    return below_high - _cumulative(low / t_max, shift, distribution)


def sample_times(
    u: Tensor,
    low: float,
    high: float,
    shift: float = 1.0,
    distribution: TimeLaw = "uniform",
    margin: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """Turn uniform numbers u [B] in [0, 1) into times, float64 [B], under the law T(t; low, high) of Phased DMD Eq. 11.

    It is the shifted law restricted to (low + margin, high], t = F^-1(F(low + margin) + u (F(high) - F(low + margin))),
    so it rises with u. The margin keeps t off s = low, where the subinterval target is singular. Times are in the
    schedule's units, up to t_max. Raises UserError for an empty interval or an unknown distribution.
    """
    lowest = low + margin
    if not 0.0 <= lowest < high <= t_max:
        raise UserError(f"times: ({lowest}, {high}] is not an interval inside (0, {t_max}]")
    if distribution not in ("uniform", "logit_normal"):
        raise UserError(f"distribution: {distribution!r} is not known{nearest(distribution, get_args(TimeLaw))}")
    f_low = _cumulative(lowest / t_max, shift, distribution)
    f_high = _cumulative(high / t_max, shift, distribution)
    p = f_low + u.to(torch.float64) * (f_high - f_low)
    plain = p if distribution == "uniform" else torch.sigmoid(torch.special.ndtri(p))
    # Open below: no sample may have t = s, not even by rounding.
    return (t_max * shift_time(plain, shift)).clamp(min=math.nextafter(lowest, math.inf), max=high)
