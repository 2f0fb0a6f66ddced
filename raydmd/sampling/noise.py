"""Sampling from a trained student: sample i of a seed is the same picture alone or in any batch."""

from dataclasses import dataclass

import torch

from raydmd.diffusion.random import Key, normal
from raydmd.models.base import Conditions, Family
from raydmd.models.experts import Experts
from raydmd.sampling.phase import Phase
from raydmd.sampling.student import steps


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


def sample_key(seed: int) -> Key:
    """Return the name of the noise of ``seed``'s samples."""
    return Key(seed, 0, "sample", 0)


def initial_noise(family: Family, seed: int, start: int, count: int) -> torch.Tensor:
    """Return the noise [count, ...] from which samples ``start .. start + count`` of ``seed`` begin."""
    noise = normal(sample_key(seed), start, count, family.latent_shape)
    return noise * float(family.schedule.sigma(family.schedule.t_max))


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
) -> StudentSamples:
    """Sample ``count`` latents; number i of the result is sample ``start + i`` of ``seed``.

    They begin from `initial_noise`.
    """
    key = sample_key(seed)
    times = [phases[0].times[0], *(t for phase in phases for t in phase.times[1:])]
    made = steps(family, experts, phases, key, start, conditions, count, solver=solver, device=device)
    path = [(expert, t, x.cpu()) for t, (expert, x) in zip(times, made, strict=True)]
    ends, at = [], 0
    for phase in phases:
        at += phase.steps
        ends.append(path[at][2])
    return StudentSamples(path[-1][2], ends, path)
