"""Pictures of an expert while it is trained."""

from dataclasses import replace

import torch

from raydmd.models.base import Conditions
from raydmd.sampling.student import sample_student
from raydmd.training.generator import Generator


@torch.no_grad()
def preview(generator: Generator, conditions: Conditions, count: int) -> torch.Tensor:
    """Return pictures [count, C, H, W] of what the expert in training makes, from its averaged weights.

    Its last call goes straight to t = 0, so that a phase that ends earlier shows its prediction of x_0, not noise.
    """
    phase = replace(generator.phase, times=(*generator.phase.times[:-1], 0.0))
    generator.flat.swap_average()
    try:
        samples = sample_student(
            generator.family,
            generator.experts,
            [*generator.phases[: phase.index], phase],
            {name: value.to(generator.device) for name, value in conditions.items()},
            count,
            seed=generator.recipe.seed,
            solver=generator.recipe.method.solver,
            device=generator.device,
        )
    finally:
        generator.flat.swap_average()
    return generator.family.decode(samples.latents)
