"""LPIPS (Zhang et al. 2018): the distance of two pictures in a pretrained network's features; and its trunks."""

import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.errors import UserError
from raydmd.models.base import one_line
from raydmd.models.perceptual.imagenet import imagenet_weights

LpipsNet = Literal["vgg", "alex"]
MODELS: dict[str, str] = {"alex": "alexnet", "vgg": "vgg16"}  # torchvision's names
LAYERS = {
    "alex": ["relu1", "relu2", "relu3", "relu4", "relu5"],
    "vgg": ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"],
}
LEAST_SIDE = 64  # pixels: below it a trunk's deepest features are of hardly a place
DMD_SIDE = 224  # pixels: at which DMD compares pictures by VGG (DMD, appendix)


class PerceptualDistance(nn.Module):
    """LPIPS by the package ``lpips``' heads, version 0.1; frozen.

    By VGG, pictures are first resized so that the shorter side has 224 pixels, as DMD does; by AlexNet they are
    enlarged where a side has fewer than 64.

    Args:
        net: the trunk.
        key: of the recipe, that asks for it.

    Raises:
        UserError: the trunk's weights are not there.
    """

    def __init__(self, net: LpipsNet, key: str) -> None:
        super().__init__()
        self.net = net
        self.network = load_lpips(net, key)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the distances [N] of pictures [N, 1 or 3, H, W] in [-1, 1]; it can be differentiated by both."""
        total: Tensor | float = 0.0
        features = [trunk_features(self.network, self.prepare(pixels)) for pixels in (one, other)]
        for head, left, right in zip(self.network.lins, *features, strict=True):
            total = total + head((_normalized(left) - _normalized(right)).square()).mean((2, 3))[:, 0]
        assert isinstance(total, Tensor)
        return total

    def prepare(self, pixels: Tensor) -> Tensor:
        """Return pictures [N, 3, H', W'] as the trunk is given them, before its normalisation."""
        if self.net == "vgg":
            return resize_shorter(three_channels(pixels), DMD_SIDE)
        return enlarge_shorter(three_channels(pixels), LEAST_SIDE)


def load_lpips(net: str, key: str) -> Any:
    """Return the package's network with ImageNet's trunk, frozen; the global random state is left alone.

    Raises:
        UserError: the trunk's weights, or the package's heads, are not there.
    """
    import lpips

    trunk = imagenet_weights(MODELS[net], key)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's, on how lpips calls it
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    try:
        state = torch.load(heads, map_location="cpu", weights_only=True)
        for name, _ in network.net.named_parameters():  # slice1.0.weight is torchvision's features.0.weight
            state[f"net.{name}"] = trunk[f"features.{name.split('.', 1)[1]}"]
        network.load_state_dict(state, strict=False, assign=True)
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{key}: LPIPS with {net} cannot be made of {heads} and the ImageNet weights of {MODELS[net]}: "
                        f"{one_line(error)}") from error  # fmt: skip
    frozen: nn.Module = network.requires_grad_(False).eval()
    return frozen


def trunk_features(network: Any, pixels: Tensor, upto: int = 5) -> list[Tensor]:
    """Return the features [N, C, h, w] of the trunk's first ``upto`` slices on pictures [N, 3, H, W] in [-1, 1]."""
    x, found = network.scaling_layer(pixels), []
    for number in range(1, upto + 1):
        x = getattr(network.net, f"slice{number}")(x)
        found.append(x)
    return found


def three_channels(pixels: Tensor) -> Tensor:
    """Return pictures [N, 1 or 3, H, W] with three channels, grey ones repeated."""
    return pixels.expand(-1, 3, -1, -1)


def enlarge_shorter(pixels: Tensor, least: int) -> Tensor:
    """Return pictures [N, C, H, W] enlarged, bilinearly, so that the shorter side has at least ``least`` pixels."""
    return resize_shorter(pixels, least) if min(pixels.shape[-2:]) < least else pixels


def resize_shorter(pixels: Tensor, side: int) -> Tensor:
    """Return pictures [N, C, H, W] resized, bilinearly, so that the shorter side has ``side`` pixels."""
    height, width = pixels.shape[-2:]
    shorter = min(height, width)
    return resize(pixels, round(height * side / shorter), round(width * side / shorter))


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return pictures [N, C, height, width], resized bilinearly and smoothed where they shrink."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    shrinks = height < pixels.shape[-2] or width < pixels.shape[-1]
    return F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=shrinks)


def _normalized(features: Tensor) -> Tensor:
    """Return features [N, C, h, w] of length 1 at each place, as lpips does; its own has NaN for a gradient at 0."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
