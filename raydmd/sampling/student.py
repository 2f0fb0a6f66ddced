"""The few-step sampler, and rollouts of the experts from noise to a phase's end (Phased DMD Sec. 2.2-2.3, Fig. 1)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from raydmd.diffusion.random import Key, integer, normal
from raydmd.diffusion.solvers import euler_step, renoise_step
from raydmd.models.base import Conditions, Family
from raydmd.models.experts import Expert, Experts
from raydmd.sampling.noise import renoise_key, sample_key, starting_latents
from raydmd.sampling.phase import Phase


def exit_step(phase: Phase, key: Key) -> int:
    """Return the step at which SGTS leaves the phase, 1..steps: one draw for the whole global batch."""
    return 1 + integer(key, phase.steps) if phase.gradient == "sgts" else phase.steps


def truncated(phase: Phase, leave: int) -> tuple[float, ...]:
    """Return the phase's grid when its ``leave``-th call goes straight to the end."""
    return (*phase.times[:leave], phase.end)


@dataclass(frozen=True)
class Move:
    """One step of a solver.

    Attributes:
        number: of the step on the whole way, from 1.
        t: the time before it.
        t_next: the time after it.
        before: latents at ``t``, [B, ...].
        prediction: the network's on them.
        latents: those at ``t_next``.
    """

    number: int
    t: float
    t_next: float
    before: torch.Tensor
    prediction: torch.Tensor
    latents: torch.Tensor


def walk(
    family: Family,
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    times: Sequence[float],
    x: torch.Tensor,
    *,
    renoise: Callable[[int], torch.Tensor] | None = None,
    first: int = 1,
    keeps: Sequence[bool] | None = None,
) -> Iterator[Move]:
    """Make a network's steps from ``x`` one by one: the loop of training, previews, `generate`, evaluation and serving.

    Args:
        family: the network's.
        denoise: its prediction on latents [B, ...] at times [B] (float64).
        times: the step grid, falling.
        x: latents [B, ...] at ``times[0]``.
        renoise: gives the noise [B, ...] that a step adds, by its number; None: Euler's steps, which add none.
        first: number of the first step.
        keeps: for each step, whether its graph is kept; None: as it is outside.
    """
    schedule, source = family.schedule, family.prediction
    for index, (t, t_next) in enumerate(pairwise(times)):
        number = first + index
        with nullcontext() if keeps is None else torch.set_grad_enabled(keeps[index]):
            prediction = denoise(x, torch.full((len(x),), t, dtype=torch.float64, device=x.device))
            if renoise is None:
                latents = euler_step(schedule, prediction, x, t, t_next, source)
            else:
                latents = renoise_step(schedule, prediction, x, t, t_next, source, renoise(number))
        yield Move(number, t, t_next, x, prediction, latents)
        x = latents


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
    shape, number = family.latent_shape, 0
    if entry is None:
        x = starting_latents(family, normal(key, start, count, shape).to(device))
    else:
        x, number = entry, sum(phase.steps for phase in phases[:-1])
        phases = phases[-1:]

    def renoise(number: int) -> torch.Tensor:
        return normal(renoise_key(key, number), start, count, shape).to(device)

    yield phases[0].index, x
    for phase in phases:
        last_phase, expert = phase is phases[-1], experts.expert(phase.index)
        times = truncated(phase, leave) if last_phase and leave else phase.times
        calls = len(times) - 1
        keeps = [grad and last_phase and (phase.gradient == "vanilla" or step == calls) for step in range(1, calls + 1)]
        moves = walk(
            family, partial(_predict, expert, conditions), times, x,
            renoise=None if solver == "euler" else renoise, first=number + 1, keeps=keeps,
        )  # fmt: skip
        for move in moves:
            number, x = move.number, move.latents
            yield phase.index, x


def _predict(network: Expert, conditions: Conditions, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return network(x, t, conditions)


@dataclass(frozen=True)
class StudentSamples:
    """Latents on their way from noise to data.

    Attributes:
        latents: the result at t = 0 (or at the end of the last phase given), [N, ...].
        boundaries: x_s at each phase's end, [N, ...] each; the last is ``latents``.
        path: (index of the expert that made it, time, latents [N, ...]), from the initial noise on.
    """

    latents: torch.Tensor
    boundaries: list[torch.Tensor]
    path: list[tuple[int, float, torch.Tensor]]


@torch.no_grad()
def sample_student(
    family: Family,
    experts: Experts,
    phases: list[Phase],
    conditions: Conditions,
    count: int,
    *,
    seed: int = 0,
    start: int = 0,
    solver: str = "euler",
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float, torch.Tensor], None] | None = None,
) -> StudentSamples:
    """Sample ``count`` latents; number i of the result is sample ``start + i`` of ``seed``.

    They begin from `initial_noise`. ``on_step`` is told of each step: its number from 1, the time that it has reached,
    and the latents there.
    """
    key = sample_key(seed)
    times = [phases[0].times[0], *(t for phase in phases for t in phase.times[1:])]
    made = steps(family, experts, phases, key, start, conditions, count, solver=solver, device=device)
    path = []
    for number, (t, (expert, x)) in enumerate(zip(times, made, strict=True)):
        if on_step is not None and number:
            on_step(number, t, x)
        path.append((expert, t, x.cpu()))
    ends, at = [], 0
    for phase in phases:
        at += phase.steps
        ends.append(path[at][2])
    return StudentSamples(path[-1][2], ends, path)
