"""The noise that samples begin from and that steps add: sample i of a seed has the same alone or in any batch."""

import torch

from raydmd.diffusion.random import Key, normal
from raydmd.models.base import Family


def sample_key(seed: int) -> Key:
    """Return the name of the noise of ``seed``'s samples."""
    return Key(seed, 0, "sample", 0)


def renoise_key(key: Key, number: int) -> Key:
    """Return the name of the noise that step ``number`` (from 1, over all phases) adds where steps renoise."""
    return Key(key.seed, key.phase, f"{key.stream}/renoise-{number}", key.update)


def starting_latents(family: Family, noise: torch.Tensor) -> torch.Tensor:
    """Return the latents at the schedule's noisiest time that normal numbers [B, ...] are: 1 times them but for EDM."""
    return noise * float(family.schedule.sigma(family.schedule.t_max))


def initial_noise(family: Family, seed: int, start: int, count: int) -> torch.Tensor:
    """Return the latents [count, ...] from which samples ``start .. start + count`` of ``seed`` begin."""
    return starting_latents(family, normal(sample_key(seed), start, count, family.latent_shape))
