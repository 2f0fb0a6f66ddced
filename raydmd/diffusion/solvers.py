"""Solver steps: the S of a few-step rollout (Phased DMD Eq. 10), and the teacher's probability-flow ODE."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from raydmd.diffusion.schedule import Quantity, Schedule, Time, at_least_float32, broadcast


def euler_step(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Time, t_next: Time, source: Quantity) -> Tensor:
    """One deterministic step from x_t [B, ...] to t_next: alpha_next x_0 + sigma_next eps, in x_t's dtype.

    It is DDIM's step, and for rectified flow Euler's on the flow, x_t + (t_next - t) v. t_next may be 0.
    """
    x0, eps = schedule.denoised_pair(at_least_float32(prediction), x_t, t, source)
    alpha, sigma = schedule.coefficients(t_next)
    x_next = broadcast(alpha, x0) * x0 + broadcast(sigma, x0) * eps
    return x_next.to(x_t.dtype)


def renoise_step(
    schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Time, t_next: Time, source: Quantity, noise: Tensor
) -> Tensor:
    """One stochastic step: the prediction of x_0 diffused to t_next with fresh noise [B, ...], in x_t's dtype."""
    x0, _ = schedule.denoised_pair(at_least_float32(prediction), x_t, t, source)
    return schedule.diffuse(x0, noise, t_next).to(x_t.dtype)


def integrate(
    schedule: Schedule,
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Sequence[float],
    source: Quantity,
    method: Literal["euler", "heun"] = "heun",
) -> Tensor:
    """Follow the probability-flow ODE from x [B, ...] at times[0] down; every state, [len(times), B, ...].

    `denoise(x_t, t)` is the network's prediction of kind `source`. The ODE is dx = E[x_0|x] d alpha + E[eps|x] d sigma;
    Euler's method holds the pair (x_0, eps) over a step, Heun's takes the mean of the pairs at its ends, and for
    rectified flow these are Euler and Heun on the flow. Heun's method makes a step to sigma = 0 as Euler's does, since
    eps is undefined there.
    """
    states = [x]
    for t, t_next in pairwise(times):
        x0, eps = schedule.denoised_pair(at_least_float32(denoise(x, t)), x, t, source)
        alpha, sigma = schedule.alpha(t_next), schedule.sigma(t_next)
        x_next = broadcast(alpha, x0) * x0 + broadcast(sigma, x0) * eps
        if method == "heun" and float(sigma) > 0.0:
            ahead = x_next.to(x.dtype)
            x0_next, eps_next = schedule.denoised_pair(at_least_float32(denoise(ahead, t_next)), ahead, t_next, source)
            d_alpha, d_sigma = alpha - schedule.alpha(t), sigma - schedule.sigma(t)
            mean_x0, mean_eps = (x0 + x0_next) / 2, (eps + eps_next) / 2
            x_next = x + broadcast(d_alpha, x0) * mean_x0 + broadcast(d_sigma, x0) * mean_eps
        x = x_next.to(x.dtype)
        states.append(x)
    return torch.stack(states)
