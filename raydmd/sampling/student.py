"""Rollouts of the experts from noise to a phase's end (Phased DMD Sec. 2.2-2.3, Fig. 1)."""

from collections.abc import Iterator
from itertools import pairwise

import torch

from raydmd.diffusion.random import Key, integer, normal
from raydmd.diffusion.solvers import euler_step, renoise_step
from raydmd.models.base import Conditions, Family
from raydmd.models.experts import Experts
from raydmd.sampling.phase import Phase


def exit_step(phase: Phase, key: Key) -> int:
    """Return the step at which SGTS leaves the phase, 1..steps: one draw for the whole global batch."""
    return 1 + integer(key, phase.steps) if phase.gradient == "sgts" else phase.steps


def truncated(phase: Phase, leave: int) -> tuple[float, ...]:
    """Return the phase's grid when its ``leave``-th call goes straight to the end."""
    return (*phase.times[:leave], phase.end)


def renoise_key(key: Key, number: int) -> Key:
    """Return the name of the noise that step ``number`` (from 1, over all phases) adds where steps renoise."""
    return Key(key.seed, key.phase, f"{key.stream}/renoise-{number}", key.update)


def rollout(
    family: Family,
    experts: Experts,
    phases: list[Phase],
    key: Key,
    start: int,
    conditions: Conditions,
    count: int,
    *,
    solver: str = "euler",
    leave: int | None = None,
    grad: bool = False,
    entry: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return x_s [count, ...] at the end of the last of ``phases``.

    Earlier phases run whole and without gradient, or not at all where ``entry`` is what they end with. The last one
    leaves at step ``leave`` (default: its last); with ``grad``, that call keeps its graph, and in a ``vanilla`` phase
    every call does.
    """
    *_, (_, x) = steps(
        family, experts, phases, key, start, conditions, count,
        solver=solver, leave=leave, grad=grad, entry=entry, device=device,
    )  # fmt: skip
    return x


def steps(
    family: Family,
    experts: Experts,
    phases: list[Phase],
    key: Key,
    start: int,
    conditions: Conditions,
    count: int,
    *,
    solver: str = "euler",
    leave: int | None = None,
    grad: bool = False,
    entry: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (expert's index, latents) from the initial noise (index of the first expert) through every step.

    With ``entry``, the latents at which the last of ``phases`` begins, from there.
    """
    schedule, shape, number = family.schedule, family.latent_shape, 0
    if entry is None:
        x = normal(key, start, count, shape).to(device)
        x = x * float(schedule.sigma(schedule.t_max))  # 1 but for EDM
    else:
        x, number = entry, sum(phase.steps for phase in phases[:-1])
        phases = phases[-1:]
    yield phases[0].index, x
    for phase in phases:
        last_phase = phase is phases[-1]
        times = truncated(phase, leave) if last_phase and leave else phase.times
        denoise = experts.expert(phase.index)
        for step, (t, t_next) in enumerate(pairwise(times), start=1):
            keep = grad and last_phase and (phase.gradient == "vanilla" or step == len(times) - 1)
            with torch.set_grad_enabled(keep):
                at = torch.full((count,), t, dtype=torch.float64, device=device)
                prediction = denoise(x, at, conditions)
                number += 1
                if solver == "euler":
                    x = euler_step(schedule, prediction, x, t, t_next, family.prediction)
                else:
                    noise = normal(renoise_key(key, number), start, count, shape).to(device)
                    x = renoise_step(schedule, prediction, x, t, t_next, family.prediction, noise)
            yield phase.index, x
