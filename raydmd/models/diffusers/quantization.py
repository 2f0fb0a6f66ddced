"""The frozen teacher's linear layers in 8 bits, by torchao: what scores and samples; nothing that is trained.

``int8``: a weight's rows are whole numbers from -127 to 127, each row with a float32 scale; the product is computed in
the network's own dtype (torchao's ``Int8WeightOnlyConfig``). ``fp8``: a weight's rows, and at each call the rows of
what the layer is given, are e4m3 with a scale each, multiplied by the GPU's own kernel
(``Float8DynamicActivationFloat8WeightConfig`` by row). No scale depends on the other samples of a batch.
"""

import copy
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raydmd.config.recipe import Quantization
from raydmd.errors import UserError
from raydmd.models.base import QUANTIZATION_KEY as KEY
from raydmd.models.base import Denoiser, one_line

log = logging.getLogger("raydmd.models.quantization")

OLDEST = (0, 18)  # torchao's version with both configs as they are used here
GPU = (8, 9)  # compute capability of the first with fp8 kernels
MULTIPLE = 16  # of both sides of a weight, which those kernels take
PRECISE = ("time_emb",)  # in a layer's name, besides what diffusers' classes name: a UNet's projections of the time

AnyDenoiser = TypeVar("AnyDenoiser", bound=Denoiser)


@dataclass(frozen=True)
class Savings:
    """What quantizing does to a network, or to two.

    Attributes:
        layers: linear layers that are quantized.
        linear: all linear layers.
        before: bytes of all weights and buffers.
        after: the same with the layers quantized.
    """

    layers: int
    linear: int
    before: int
    after: int

    def describe(self, kind: Quantization) -> str:
        """Return one line."""
        before, after = (f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB" for n in (self.before, self.after))
        return f"{KEY}: {kind} for {self.layers} of {self.linear} linear layers: {after} of weights, not {before}"


def check_library() -> None:
    """Refuse a machine without torchao.

    Raises:
        UserError: ``teacher.quantization: ...``: it is not installed, or too old.
    """
    advice = "install it with `pip install 'raydmd[quantization]'`"
    try:
        there = version("torchao")
    except PackageNotFoundError:
        raise UserError(f"{KEY}: it needs torchao, which is not installed here; {advice}") from None
    if tuple(int(part) for part in re.findall(r"\d+", there)[:2]) < OLDEST:
        raise UserError(f"{KEY}: it needs torchao {OLDEST[0]}.{OLDEST[1]} or newer, not {there}; {advice}")


def check_dtype(kind: Quantization, dtype: str) -> None:
    """Refuse weights of a dtype that a kind's kernels do not take.

    Raises:
        UserError: ``teacher.quantization: ...``.
    """
    if kind == "fp8" and dtype != "bfloat16":
        raise UserError(f"{KEY}: fp8 needs teacher.options.dtype: bfloat16, not {dtype}")


def check_device(kind: Quantization, device: torch.device) -> None:
    """Refuse a device without a kind's kernels.

    Raises:
        UserError: ``teacher.quantization: ...``.
    """
    if kind != "fp8":
        return
    needed = f"{KEY}: fp8 needs a GPU of compute capability {GPU[0]}.{GPU[1]} or above (Ada, Hopper and newer)"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"{needed}, and the teacher would be on {device.type}; int8 runs there")
    if (there := torch.cuda.get_device_capability(device)) < GPU:
        raise UserError(f"{needed}; {torch.cuda.get_device_name(device)} has {there[0]}.{there[1]}; int8 runs there")


def layers_to_quantize(network: nn.Module, kind: Quantization) -> list[str]:
    """Return the names of the linear layers of a diffusers model that are quantized.

    They are in its blocks: embeddings and the last projection, which are outside, stay as they are. So do
    layers that diffusers' own class names as sensitive (``_keep_in_fp32_modules``, ``_skip_layerwise_casting_patterns``
    and what its layerwise casting skips by default: norms and what modulates them), projections of the time, and
    weights of sizes that the kernels do not take.
    """
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    own = getattr(network, "_skip_layerwise_casting_patterns", None) or ()
    sensitive = re.compile("|".join((*DEFAULT_SKIP_MODULES_PATTERN, *own, *PRECISE)))
    return [
        name
        for name, layer in _linear_layers(network)
        if _in_blocks(network, name)
        and not sensitive.search(name)
        and not _in_float32(network, name)
        and (kind != "fp8" or not any(size % MULTIPLE for size in layer.weight.shape))
    ]


def savings(networks: Sequence[nn.Module], kind: Quantization) -> Savings:
    """Return what quantizing some networks would save; they may be on the meta device."""
    chosen = [_weight(network, name) for network in networks for name in layers_to_quantize(network, kind)]
    less = sum(_bytes(weight) - _bytes_quantized(weight, kind) for weight in chosen)
    before, linear = weight_bytes(networks), sum(len(_linear_layers(network)) for network in networks)
    return Savings(len(chosen), linear, before, before - less)


def check_layers(networks: Sequence[nn.Module], kind: Quantization) -> None:
    """Refuse networks in which nothing would be quantized.

    Raises:
        UserError: ``teacher.quantization: ...``.
    """
    if not savings(networks, kind).layers:
        sizes = f" of sizes that {MULTIPLE} divides" if kind == "fp8" else ""
        raise UserError(f"{KEY}: the teacher's {type(networks[0]).__name__} has no linear layer{sizes} in its blocks; "
                        f"leave it out")  # fmt: skip


def quantized_copy(denoiser: AnyDenoiser, kind: Quantization, device: torch.device) -> AnyDenoiser:
    """Return a copy of a frozen denoiser with its layers quantized; the denoiser itself stays as it is.

    The weights are quantized where they are, before they go to ``device``: with the CPU's arithmetic they are the same
    bits for every device.

    Args:
        denoiser: of diffusers' networks (`raydmd.models.diffusers.denoiser.PretrainedDenoiser`).
        kind: ``int8`` or ``fp8``.
        device: where the copy will compute.

    Raises:
        UserError: ``teacher.quantization: ...``: no torchao, a device without the kernels, nothing to quantize.
    """
    check_library()
    check_device(kind, device)
    networks = diffusers_networks(denoiser)
    check_layers(networks, kind)
    names = [layers_to_quantize(network, kind) for network in networks]
    told = savings(networks, kind)
    weights = [_weight(network, name) for network, own in zip(networks, names, strict=True) for name in own]
    copied = copy.deepcopy(denoiser, {id(weight): weight for weight in weights})  # those are replaced, not copied
    for network, own in zip(diffusers_networks(copied), names, strict=True):
        _quantize(network, set(own), kind)
    log.info("%s", told.describe(kind))
    return copied


def diffusers_networks(denoiser: Denoiser) -> list[nn.Module]:
    """Return the diffusers models that a denoiser is made of."""
    parts: Sequence[Any] = denoiser.parts
    return [part.network for part in parts]


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    """Return the bytes of some networks' weights and buffers, quantized or not."""
    return sum(_bytes(each) for network in networks for each in (*network.parameters(), *network.buffers()))


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the weights of a network on the meta device the dtype that diffusers' loading gives them."""
    for name, parameter in network.named_parameters():
        if not _in_float32(network, name):
            parameter.data = parameter.data.to(dtype)
    return network


def _quantize(network: nn.Module, names: set[str], kind: Quantization) -> None:
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
        from torchao.quantization.quantize_.common import KernelPreference
    except ImportError as error:
        raise UserError(f"{KEY}: torchao cannot be imported: {one_line(error)}") from error
    config: Any
    if kind == "int8":
        config = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    else:  # always torch's kernels: another library that is installed by chance would give other bits
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), kernel_preference=KernelPreference.TORCH, set_inductor_config=False
        )
    quantize_(network, config, filter_fn=lambda module, name: name in names)


def _linear_layers(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def _weight(network: nn.Module, name: str) -> Tensor:
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.weight


def _in_blocks(network: nn.Module, name: str) -> bool:
    """Whether a module is in one of a network's own lists of blocks, or in a UNet's middle block."""
    part = name.partition(".")[0]
    return part == "mid_block" or isinstance(getattr(network, part), nn.ModuleList)


def _in_float32(network: nn.Module, name: str) -> bool:
    """Whether diffusers keeps a module or parameter in float32, whatever dtype is asked for."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))


def _bytes(tensor: Tensor) -> int:
    inner = [getattr(tensor, name) for name in getattr(tensor, "tensor_data_names", ())]
    inner += [getattr(tensor, name) for name in getattr(tensor, "optional_tensor_data_names", ())]
    return sum(_bytes(each) for each in inner if each is not None) if inner else tensor.numel() * tensor.element_size()


def _bytes_quantized(weight: Tensor, kind: Quantization) -> int:
    """Return the bytes of a weight [out, in] with a float32 scale a row, and of int8 a zero point of a byte."""
    return weight.numel() + weight.shape[0] * (5 if kind == "int8" else 4)
