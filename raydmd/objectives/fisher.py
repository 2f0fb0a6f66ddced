"""Score identity distillation: the Fisher divergence between the generated and the teacher's p(x_t) (SiD Sec. 3).

With A = E_teacher[x_s | x_t] and B = E_fake[x_s | x_t] (predictions of x_0 where s = 0), SiD's Eq. 23 is

    L = (1 - alpha) |A - B|^2 + (A - B) . (B - x_s)

Its first form, |A - B|^2, needs the fake score's derivative by the generator's weights, which nobody has; by the score
identity E[(A - B) . (B - x_s)] = 0 at the optimal fake score, (A - B) . (A - x_s) is as good, and alpha is how much of
the first, biased form is taken off. SiD has this at s = 0 alone; the identity holds for x_s at any phase's end, since
B is then the mean of x_s given x_t, and so the divergence can be minimised phase by phase.
"""

import torch
from torch import Tensor

from raydmd.diffusion.schedule import Prediction, Schedule, Time, at_least_float32


def fisher_loss(
    schedule: Schedule,
    x_s: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    fake: Tensor,
    t: Time,
    s: Time,
    prediction: Prediction,
    alpha: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """SiD's loss of each sample, [B], a mean over its elements, over the detached mean |x_s - A| (SiD Eq. 27).

    x_s, x_t, teacher (guided), fake: [B, ...], predictions at x_t; 0 <= s < t. It is to be differentiated by all four:
    what comes to the predictions goes on through the networks to x_t, and from x_t to x_s. In at least float32.
    """
    x_s, x_t, teacher, fake = (at_least_float32(x) for x in (x_s, x_t, teacher, fake))
    real = schedule.posterior_mean(teacher, x_t, t, prediction, s)
    generated = schedule.posterior_mean(fake, x_t, t, prediction, s)
    apart = real - generated
    loss = ((1.0 - alpha) * apart.square() + apart * (generated - x_s)).flatten(1).mean(1)
    with torch.no_grad():
        distance = (x_s - real).abs().flatten(1).mean(1)
    return loss / (distance + eps)
