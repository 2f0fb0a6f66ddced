"""Trainable heads of a discriminator, one for each block whose features it reads (DMDX, appendix; DMD2 Sec. 4.3)."""

from math import gcd

import torch
from torch import Tensor, nn

GROUPS = 32
CHANNELS = 8  # of a group at least: one alone, at one place, would be normalised to nothing
HALVINGS = 3  # of a map's sides, where it has so many


class Head(nn.Module):
    """A logit [B] from one block's features.

    Of a map [B, C, H, W]: three times a 4x4 convolution of stride 2, GroupNorm 32 and SiLU, a 3x3 convolution with the
    same, the mean over places, and a linear layer. Of a video [B, C, F, H, W]: with 3x3x3 convolutions and pooling over
    time as over space. Of a vector [B, C]: two linear layers with SiLU. A map that is too small has fewer halvings.

    Args:
        features: shape of a sample's features, without the batch.
        width: channels of the hidden layers.
    """

    def __init__(self, features: tuple[int, ...], width: int) -> None:
        super().__init__()
        channels, grid = features[0], features[1:]
        layers: list[nn.Module] = []
        if not grid:
            layers = [nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        elif len(grid) == 2:
            sides = list(grid)
            for _ in range(HALVINGS):
                if min(sides) < 2:
                    break
                layers += [nn.Conv2d(channels, width, 4, 2, 1), *_normed(width)]
                channels, sides = width, [side // 2 for side in sides]
            layers += [nn.Conv2d(channels, width, 3, 1, 1), *_normed(width), _Mean()]
        else:
            sides = list(grid)
            for _ in range(HALVINGS):
                halved = [2 if side > 1 else 1 for side in sides]
                layers += [nn.Conv3d(channels, width, 3, 1, 1), *_normed(width)]
                if max(halved) > 1:
                    layers.append(nn.AvgPool3d((halved[0], halved[1], halved[2])))
                channels, sides = width, [side // by for side, by in zip(sides, halved, strict=True)]
            layers.append(_Mean())
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [B] of ``features`` [B, C, ...]."""
        out: Tensor = self.layers(features)
        return out[:, 0]


class Heads(nn.ModuleList):
    """A head for each of several blocks.

    Args:
        features: shape of a sample's features of each block, without the batch.
        width: channels of the hidden layers.
        seed: of the initial weights; the global random state is left alone.
    """

    def __init__(self, features: list[tuple[int, ...]], width: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(Head(shape, width) for shape in features)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the logits [B, heads], in the heads' own precision."""
        dtype = next(self.parameters()).dtype
        return torch.stack([head(each.to(dtype)) for head, each in zip(self, features, strict=True)], dim=1)


class _Mean(nn.Module):
    """The mean over all places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _normed(width: int) -> list[nn.Module]:
    groups = gcd(GROUPS, max(width // CHANNELS, 1), width)
    return [nn.GroupNorm(groups, width), nn.SiLU()]
