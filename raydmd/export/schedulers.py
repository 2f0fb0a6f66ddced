"""Whether a diffusers scheduler makes a student's steps: it is made, and asked."""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from raydmd.diffusion.solvers import euler_step
from raydmd.diffusion.times import step_grid
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.student_sampler import SAME, Sampler


def visits(sampler: Sampler, times: Sequence[float], family: PretrainedFamily) -> bool:
    """Return whether a scheduler's noise levels and timesteps are those of times [t_max, ..., 0].

    Of one that keeps no ``sigmas`` the steps themselves are compared with the family's own.
    """
    import diffusers

    kind, count = getattr(diffusers, sampler.scheduler, None), len(times) - 1
    if kind is None:
        return False  # of a newer diffusers
    scheduler, call = kind(**sampler.config), sampler.call
    if sampler.sigmas:
        scheduler.set_timesteps(count, sigmas=list(sampler.sigmas))
    elif given := {key: call[key] for key in ("sigmas", "timesteps") if key in call}:
        scheduler.set_timesteps(**given)
    elif family.gives_sigmas:
        scheduler.set_timesteps(sigmas=step_grid(count)[:-1])
    else:
        scheduler.set_timesteps(count)
    t = torch.tensor(times, dtype=torch.float64)
    visited, wanted = scheduler.timesteps.to(torch.float64), family.network_timesteps(t[:-1])
    if visited.shape != wanted.shape or (visited - wanted).abs().max() > 1000 * SAME:
        return False
    if not hasattr(scheduler, "sigmas"):
        return _steps_alike(scheduler, times, family)
    levels, found = family.noise_levels(t), scheduler.sigmas.to(torch.float64)
    return found.shape == levels.shape and torch.allclose(found, levels, rtol=1e-5, atol=2 * SAME)


def _steps_alike(scheduler: Any, times: Sequence[float], family: PretrainedFamily) -> bool:
    """Return whether a scheduler's steps, which its timesteps are set for, are those from each time to the next."""
    draw = torch.Generator().manual_seed(0)
    x, prediction = (torch.randn(1, 64, dtype=torch.float64, generator=draw) for _ in range(2))
    drawn = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for (t, t_next), timestep in zip(pairwise(times), scheduler.timesteps, strict=True):
        made = scheduler.step(prediction, timestep, x, **drawn, return_dict=False)[0]
        wanted = euler_step(family.schedule, prediction, x, t, t_next, family.prediction)
        if not torch.allclose(made, wanted, rtol=0.0, atol=5 * SAME):
            return False
    return True
