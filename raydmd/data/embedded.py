"""Clean samples of the embedded data sets, keyed by sample, for training their teachers."""

import functools

import numpy as np
import torch

from raydmd.data import ring
from raydmd.data.digits import load_digits
from raydmd.diffusion.random import Key, uniform
from raydmd.errors import UserError

EMBEDDED = ("digits", "ring")


def clean_batch(family: str, key: Key, start: int, count: int) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Return x_0 [count, *latent_shape] of samples ``start .. start + count`` of a draw, and their prompt rows.

    Raises:
        UserError: the family has no data set of its own.
    """
    if family == "ring":
        return ring.sample(count, key, start), {}
    if family != "digits":
        raise UserError(f"teacher.family: '{family}' has no embedded data set (one of: {', '.join(EMBEDDED)})")
    images, labels = _digits()
    index = (uniform(key, start, count) * len(images)).long()
    return images[index], {"label": labels[index].numpy()}


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    return load_digits("all")
