"""Distribution matching: the gradient that moves generated x_s toward the teacher's p(x_s).

DMD (Eqs. 7, 8) compares the scores of the generated and of the teacher's distribution after diffusion. Phased DMD
(Eq. 11) does so for x_s at the end of a phase, with t drawn from (s, 1).

The weight used in practice is that of DMD's code, (fake - teacher) / mean |x - teacher| of predictions of x_0. DMD's
Eq. 7 with Eq. 8 to the letter has a further alpha_t: with w_t = (sigma_t^2 / alpha_t) / mean |x - teacher| and score =
(alpha_t x_0 - x_t) / sigma_t^2, w_t alpha_t (score_fake - score_teacher) = alpha_t (fake - teacher) /
mean |x - teacher|.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from raydmd.diffusion.schedule import Prediction, Schedule, Time, at_least_float32, broadcast

Weight = Literal["normalized", "raw", "sigma_over_alpha", "sigma_cubed_over_alpha"]
"""The weight of the gradient over time: that of DMD's code (DMD Eqs. 7 and 8 without their alpha_t), Phased DMD Eq. 11
bare, or that with the w_t of DreamFusion and ProlificDreamer to which DMD's Table 2 compares its own."""


def raw_weight(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """w_{t|s} = alpha_{t|s} / (sigma_t + sigma_t^2 / alpha_t), float64 (Phased DMD Eq. 11); 0 where alpha_t = 0."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return schedule.bridge(s, t).alpha * alpha / (sigma * (alpha + sigma))


def weight_over_time(schedule: Schedule, t: Time, s: Time, power: int) -> Tensor:
    """alpha_{t|s} w_t / (sigma_t + sigma_t^2 / alpha_t) with w_t = sigma_t^power / alpha_t, float64 (DMD Table 2)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return schedule.bridge(s, t).alpha * sigma ** (power - 1) / (alpha + sigma)


def distribution_matching_gradient(
    schedule: Schedule,
    x_s: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    fake: Tensor,
    t: Time,
    s: Time,
    prediction: Prediction,
    weight: Weight = "normalized",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The gradient of KL(generated || teacher) with respect to x_s, like x_s, in float32 (float64 if given float64).

    x_s, x_t, teacher, fake: [B, ...], with teacher (guided) and fake the predictions at x_t; 0 <= s < t.
    x_s - lr * gradient lies nearer to the teacher's distribution. The result is detached.

    raw (Phased DMD Eq. 11, predictions as flows; T the teacher, F the fake score):

        w_{t|s} (T - F)  =  alpha_{t|s} (score_fake - score_teacher)

    sigma_over_alpha, sigma_cubed_over_alpha: the same times sigma_t / alpha_t or sigma_t^3 / alpha_t.

    normalized (the weight of DMD's code, which is DMD's Eqs. 7 and 8 without their factor alpha_t; with the posterior
    mean of x_s for that of x_0, the two being one at s = 0):

        (E_fake[x_s | x_t] - E_teacher[x_s | x_t]) / (mean |x_s - E_teacher[x_s | x_t]| + eps)

    with the mean over the elements of each sample, never over the batch, where one sample would set another's step.

    A sample whose gradient holds any NaN or infinity gets zeros throughout, so that it cannot spoil the batch. Which
    they are is the second result, bool [B]: `raydmd.training.zeroed` counts them, for they tell of a broken network.
    Raises ValueError for an unknown weight.
    """
    with torch.no_grad():
        x_s, x_t, teacher, fake = (at_least_float32(x) for x in (x_s, x_t, teacher, fake))
        if weight in ("raw", "sigma_over_alpha", "sigma_cubed_over_alpha"):
            teacher_flow = schedule.convert(teacher, x_t, t, prediction, "flow")
            fake_flow = schedule.convert(fake, x_t, t, prediction, "flow")
            powers = {"sigma_over_alpha": 1, "sigma_cubed_over_alpha": 3}
            over_time = (
                weight_over_time(schedule, t, s, powers[weight]) if weight in powers else raw_weight(schedule, t, s)
            )
            gradient = broadcast(over_time, x_t) * (teacher_flow - fake_flow)
        elif weight == "normalized":
            teacher_mean = schedule.posterior_mean(teacher, x_t, t, prediction, s)
            fake_mean = schedule.posterior_mean(fake, x_t, t, prediction, s)
            distance = (x_s - teacher_mean).abs().flatten(1).mean(1)
            gradient = (fake_mean - teacher_mean) / (broadcast(distance, x_s) + eps)
        else:
            raise ValueError(f"unknown weight {weight!r}: one of {', '.join(get_args(Weight))}")
        finite = gradient.isfinite().flatten(1).all(1)
        return torch.where(finite.reshape(-1, *[1] * (x_s.ndim - 1)), gradient, 0.0), ~finite


def surrogate_loss(x_s: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x_s [B, ...] is gradient / x_s.numel(): half the MSE to x_s - gradient.

    The target is detached. In at least float32.
    """
    x = at_least_float32(x_s)
    return 0.5 * mse_loss(x, (x - gradient).detach())
