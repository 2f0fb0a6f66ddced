"""Score matching inside a subinterval (s, 1), where only x_s and no clean x_0 is known (Phased DMD section 2.3.2).

With x_t = alpha_{t|s} x_s + sigma_{t|s} eps, the score of p(x_t | x_s) is -eps / sigma_{t|s}. Put into Phased DMD Eq. 5
in place of the score of p(x_t | x_0), it gives targets whose mean given x_t is that of the usual ones:

    eps    (sigma_t / sigma_{t|s}) eps
    x_0    x_s / alpha_s - (alpha_t sigma_s^2) / (alpha_s^2 sigma_{t|s}) eps                              Eq. 15
    flow   (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_{t|s}) eps - x_s / alpha_s          Eq. 12
    v      alpha_t (eps's) - sigma_t (x_0's)

Eqs. 13, 14 and 15 carry misprints (the sign of x_s, 1 / sigma_s for 1 / alpha_s, and the coefficient of eps); Eq. 12 is
right, and is what follows.
"""

from typing import Literal

import torch
from torch import Tensor

from raydmd.diffusion.schedule import Prediction, Schedule, Time, at_least_float32, broadcast

Target = Literal["subinterval", "naive"]
"""Which target the fake score is trained on; "naive" is for ablations."""


def _coefficients(schedule: Schedule, t: Time, s: Time, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(A, B), float64, of the target (A / sigma_{t|s}) eps + B x_s; neither is singular at t = s."""
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    eps_noise = sigma_t
    x0_noise, x0_data = -alpha_t * sigma_s.square() / alpha_s.square(), 1.0 / alpha_s
    match prediction:
        case "eps":
            return eps_noise, torch.zeros_like(x0_data)
        case "x0":
            return x0_noise, x0_data
        case "flow":
            return eps_noise - x0_noise, -x0_data
        case "v":
            return alpha_t * eps_noise - sigma_t * x0_noise, -sigma_t * x0_data
        case _:
            raise ValueError(f"unknown prediction {prediction!r}: one of flow, eps, x0, v")


def subinterval_target(
    schedule: Schedule, x_s: Tensor, noise: Tensor, t: Time, s: Time, prediction: Prediction
) -> Tensor:
    """The unbiased target at x_t = alpha_{t|s} x_s + sigma_{t|s} noise, in x_s's dtype (Phased DMD Eq. 12, 15).

    x_s, noise: [B, ...]; 0 <= s < t. At s = 0 it is the usual target. Its noise term grows as 1 / sigma_{t|s} when
    t nears s, and it is infinite at t = s: train with `score_matching_loss`, which never divides by sigma_{t|s}.
    Raises ValueError for an unknown prediction.
    """
    noise_scaled, data = _coefficients(schedule, t, s, prediction)
    x, noise = at_least_float32(x_s), at_least_float32(noise)
    target = broadcast(noise_scaled / schedule.bridge(s, t).sigma, x) * noise + broadcast(data, x) * x
    return target.to(x_s.dtype)


def naive_target(schedule: Schedule, x_s: Tensor, noise: Tensor, t: Time, s: Time, prediction: Prediction) -> Tensor:
    """The usual target with x_s taken for x_0 (Phased DMD Fig. 2c), in x_s's dtype: biased unless s = 0. For ablations.

    x_s, noise: [B, ...]. s is not used; it stands for the sake of a common signature. Raises ValueError for an unknown
    prediction.
    """
    x, noise = at_least_float32(x_s), at_least_float32(noise)
    match prediction:
        case "eps":
            target = noise
        case "x0":
            target = x
        case "flow":
            target = noise - x
        case "v":
            target = broadcast(schedule.alpha(t), x) * noise - broadcast(schedule.sigma(t), x) * x
        case _:
            raise ValueError(f"unknown prediction {prediction!r}: one of flow, eps, x0, v")
    return target.to(x_s.dtype)


def score_matching_loss(
    schedule: Schedule,
    output: Tensor,
    x_s: Tensor,
    noise: Tensor,
    t: Time,
    s: Time,
    prediction: Prediction,
    clamp: float | None = 10.0,
    target: Target = "subinterval",
) -> Tensor:
    """The fake score's loss for each sample, [B]: a mean over its elements, in float32 (float64 if given float64).

    The stable form of Phased DMD Eq. 13, with its sign put right:

        clamp(1 / sigma_{t|s}^2) || sigma_{t|s} output - sigma_{t|s} target ||^2

    where sigma_{t|s} target is worked out without a division by sigma_{t|s}. The clamp, an upper limit on
    1 / sigma_{t|s}^2, is a weight alone: it moves no minimiser, and it tames the target's variance near t = s. It acts
    for s > 0 only; None stands for no limit, which wants t off s. The naive target has weight 1. output, x_s, noise:
    [B, ...]; 0 <= s < t. Raises ValueError for an unknown prediction or target.
    """
    out, x, noise = at_least_float32(output), at_least_float32(x_s), at_least_float32(noise)
    if target == "naive":
        return (out - naive_target(schedule, x, noise, t, s, prediction)).square().flatten(1).mean(1)
    if target != "subinterval":
        raise ValueError(f"unknown target {target!r}: one of subinterval, naive")
    noise_scaled, data = _coefficients(schedule, t, s, prediction)
    sigma = schedule.bridge(s, t).sigma
    scaled_target = broadcast(noise_scaled, x) * noise + broadcast(sigma * data, x) * x
    squared = (broadcast(sigma, out) * out - scaled_target).square().flatten(1).mean(1)
    weight = sigma.square().reciprocal()
    if clamp is not None:
        inside = (schedule.sigma(s) > 0.0).to(weight.device)
        weight = torch.where(inside, weight.clamp(max=clamp), weight)
    return broadcast(weight, squared) * squared
