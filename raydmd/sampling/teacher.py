"""The many-step sampler: the teacher's own times, and its probability-flow ODE."""

from collections.abc import Callable
from typing import Literal

import torch

from raydmd.diffusion.solvers import integrate
from raydmd.models.base import Family

SAME = 1e-9  # times that differ by less are one


def first_time(family: Family, times: list[float]) -> float:
    """Return the time at which a falling grid begins: the schedule's noisiest, or one below it."""
    t_max = family.schedule.t_max
    return times[0] if times[0] < t_max - SAME else t_max


def noise_at(family: Family, noise: torch.Tensor, t: float) -> torch.Tensor:
    """Return noise [B, ...] of the schedule's noisiest time as that of the time at which a sampler's grid begins.

    A grid need not begin at the noisiest time: diffusers' ``leading`` timesteps of SDXL begin at 981 of 999.
    """
    schedule = family.schedule
    return noise if t == schedule.t_max else noise * float(schedule.sigma(t) / schedule.sigma(schedule.t_max))


def cut_grid(times: list[float], start: float) -> list[float]:
    """Return a falling grid from ``start`` on."""
    return [start, *(t for t in times if t < start - SAME)]


def follow_ode(
    family: Family,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    times: list[float],
    method: Literal["euler", "heun"] = "heun",
) -> torch.Tensor:
    """Follow the PF-ODE from ``x`` [B, ...] at ``times[0]`` down; every state, [points, B, ...].

    Args:
        family: the network's.
        predict: its guided prediction on latents [B, ...] at times [B] (float64).
        x: where it begins.
        times: falling.
        method: Heun's has two calls a step, but for the last.
    """

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return predict(x, torch.full((x.shape[0],), t, dtype=torch.float64))

    return integrate(family.schedule, denoise, x, times, family.prediction, method)
