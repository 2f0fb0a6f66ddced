"""The loop that one would write by hand for the digits recipe: what the reference trainer's structure costs beside it.

Plain torch, one process, the whole batch at once: rollouts of the experts so far, fake updates by the subinterval
loss, guided teacher, normalised distribution-matching gradient, clipping, AdamW, a moving average. The same network
calls on the same shapes as the recipe's method makes, exit steps included; random numbers straight from torch.
"""

import copy
import time

import torch
from torch.nn.utils import clip_grad_norm_

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import Key
from raydmd.methods.registry import plan_phases
from raydmd.models.base import Denoiser, Family
from raydmd.sampling.plan import plan_iterations
from raydmd.sampling.student import exit_step


def bare_loop(recipe: Recipe, family: Family, teacher: Denoiser, labels: torch.Tensor) -> list[float]:
    """Distil by hand; return the seconds of each iteration."""
    method, size, seconds = recipe.method, recipe.batch.size, []
    phases = plan_phases(recipe)
    experts: list[Denoiser] = []
    iteration = 0
    for phase, length in zip(phases, plan_iterations(recipe, phases), strict=True):
        expert = copy.deepcopy(teacher).requires_grad_(True)
        average = copy.deepcopy(teacher)
        fake = copy.deepcopy(teacher).requires_grad_(True)
        generator_adam = torch.optim.AdamW(expert.parameters(), lr=5e-4, betas=(0.0, 0.999), weight_decay=0.0)
        fake_adam = torch.optim.AdamW(fake.parameters(), lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0)
        s = phase.end

        # ruff: noqa: B023 - both are used in this turn of the loop alone
        def rollout(label: torch.Tensor, leave: int, grad: bool) -> torch.Tensor:
            x = torch.randn(size, *family.latent_shape)
            runs = [(other, done.times) for other, done in zip(experts, phases, strict=False)]
            runs.append((expert, (*phase.times[:leave], phase.end)))
            for network, times in runs:
                for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
                    with torch.set_grad_enabled(grad and network is expert and i == len(times) - 2):
                        v = network(x, torch.full((size,), t), {"label": label})
                        x = x + (t_next - t) * v
            return x

        def noised(x_s: torch.Tensor) -> tuple[torch.Tensor, ...]:
            t = (s + 0.02 + (0.98 - s) * torch.rand(size)).view(-1, 1, 1, 1)
            noise = torch.randn_like(x_s)
            alpha = (1 - t) / (1 - s)
            sigma = (t**2 - alpha**2 * s**2).clamp(min=0).sqrt()
            return alpha * x_s + sigma * noise, t, noise, alpha, sigma

        for _ in range(length):
            since = time.perf_counter()
            for update in range(method.fake_updates + 1):
                draw = iteration * (method.fake_updates + 1) + update
                leave = exit_step(phase, Key(recipe.seed, phase.index, "exit", draw))
                label = labels[torch.randint(len(labels), (size,))]
                own = update == method.fake_updates
                x_s = rollout(label, leave, own)
                x_t, t, noise, alpha, sigma = noised(x_s.detach())
                if not own:
                    weight = (1 / sigma**2).clamp(max=10.0) if s else 1 / sigma**2
                    c = ((1 - s) ** 2 * t + (1 - t) * s**2) / (1 - s) ** 2
                    output = fake(x_t, t.flatten(), {"label": label})
                    loss = (weight * (sigma * output - (c * noise - sigma / (1 - s) * x_s)) ** 2).mean()
                    fake_adam.zero_grad()
                    loss.backward()
                    clip_grad_norm_(fake.parameters(), 1.0)
                    fake_adam.step()
                    loss.item()
            with torch.no_grad():
                double = {"label": torch.cat([label, torch.full_like(label, 10)])}
                both = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]).flatten(), double)
                conditional, unconditional = both.chunk(2)
                real = unconditional + recipe.teacher.guidance_scale * (conditional - unconditional)
                generated = fake(x_t, t.flatten(), {"label": label})
                means = []
                for v in (real, generated):
                    x0, e = x_t - t * v, x_t + (1 - t) * v
                    means.append((1 - s) * x0 + alpha * s**2 / t * e)
                gradient = means[1] - means[0]
                gradient = gradient / ((x_s - means[0]).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6)
            generator_adam.zero_grad()
            (0.5 * ((x_s - (x_s - gradient).detach()) ** 2).mean()).backward()
            clip_grad_norm_(expert.parameters(), 1.0)
            generator_adam.step()
            with torch.no_grad():
                for kept, parameter in zip(average.parameters(), expert.parameters(), strict=True):
                    kept.lerp_(parameter, 1 - recipe.ema)
            seconds.append(time.perf_counter() - since)
            iteration += 1
        experts.append(average.requires_grad_(False))
    return seconds
