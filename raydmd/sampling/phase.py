"""A phase of distillation: which steps an expert makes, where its samples end, which t its scores see."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from raydmd.config.recipe import MethodOptions
from raydmd.diffusion.times import sample_times


@dataclass(frozen=True)
class Phase:
    """Expert ``index`` maps p(x_{times[0]}) to p(x_{times[-1]}) in ``len(times) - 1`` network calls.

    Attributes:
        index: 0 for the first expert (the noisiest interval).
        times: the expert's step grid, falling; its last value is the phase's end ``s``.
        score_low: lower end of the interval from which the scores' t is drawn.
        score_high: its upper end; equal to ``score_low`` when t is fixed.
        t_max: the schedule's noisiest time.
        gradient: ``sgts`` draws an exit step and keeps one call's graph, ``vanilla`` keeps all of them.
    """

    index: int
    times: tuple[float, ...]
    score_low: float
    score_high: float
    t_max: float
    gradient: Literal["sgts", "vanilla"]

    @property
    def steps(self) -> int:
        """Network calls of the phase."""
        return len(self.times) - 1

    @property
    def end(self) -> float:
        """The time s at which the phase's samples x_s live."""
        return self.times[-1]

    @property
    def interval(self) -> tuple[float, float]:
        """The times, the noisiest and the phase's end, between which the expert is called."""
        return self.times[0], self.times[-1]

    def score_times(self, method: MethodOptions, u: torch.Tensor) -> torch.Tensor:
        """Draw t ~ T(t; low, high) (Phased DMD Sec. 2.3.1) from uniform ``u`` [B]; float64 [B]."""
        if self.score_low == self.score_high:
            return torch.full_like(u, self.score_low)
        return sample_times(
            u,
            self.score_low,
            self.score_high,
            shift=method.score_shift,
            distribution=method.score_distribution,
            margin=method.score_margin * self.t_max,
            t_max=self.t_max,
        )


def make_phase(
    method: MethodOptions, index: int, times: list[float], gradient: Literal["sgts", "vanilla"], t_max: float
) -> Phase:
    """Build a phase with the score interval that the recipe's switch asks for.

    ``nested`` is T(t; s, 1) (Phased DMD Eq. 11), ``disjoint`` T(t; t_k, t_{k-1}) as TDM has it (Appendix E.2),
    ``fixed`` one t for all (Appendix E.2, Fig. 9).
    """
    low, high = times[-1], {"nested": t_max, "disjoint": times[0], "fixed": t_max}[method.score_interval]
    if method.score_interval == "fixed":
        assert method.fixed_t is not None
        low = high = method.fixed_t * t_max
    return Phase(index, tuple(times), low, high, t_max, method.gradient or gradient)


def segment_of(phase: Phase, step: int, method: MethodOptions) -> Phase:
    """Return the way from a phase's begin to the end of its ``step``-th step, 1..steps, as a phase of its own.

    Its scores see t from that step's own interval where ``score_interval`` is ``disjoint`` (TDM Sec. 4.1), up to the
    noisiest where it is ``nested``, and the fixed one.
    """
    end = phase.times[step]
    high = phase.times[step - 1] if method.score_interval == "disjoint" else phase.score_high
    low = phase.score_low if method.score_interval == "fixed" else end
    return replace(phase, times=phase.times[: step + 1], score_low=low, score_high=high)
