"""scikit-learn's 8x8 digits: 1,797 pictures of ten classes, part of the package, no download."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

SIZE = 8
CLASSES = 10
PIXEL_SCALE = 1.0
"""A pixel of 0..16 becomes ``PIXEL_SCALE * (pixel / 8 - 1)``, in [-1, 1] (mean -0.39, standard deviation 0.75)."""

HELD_OUT_EVERY = 5


def load_digits(split: Literal["all", "train", "test"] = "all") -> tuple[Tensor, Tensor]:
    """Return images float32 [N, 1, 8, 8] in [-1, 1] times ``PIXEL_SCALE``, and labels int64 [N], in file order.

    ``test`` is every fifth picture (359), ``train`` the others (1,438), ``all`` the 1,797.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    images = torch.from_numpy(data.images.astype(np.float32)).reshape(-1, 1, SIZE, SIZE)
    images = PIXEL_SCALE * (images / 8 - 1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    if split == "all":
        return images, labels
    held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = held_out if split == "test" else ~held_out
    return images[chosen], labels[chosen]
