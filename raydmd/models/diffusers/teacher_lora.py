"""A LoRA file that makes a fine-tuned teacher: read in the forms that diffusers and PEFT write, fused into the network.

W' = W + s B A, where s is alpha / rank (alpha / sqrt(rank) with PEFT's ``use_rslora``), alpha is what the file says of
the layer, and the rank where it says nothing (LoRA, Sec. 4.1; `peft.tuners.lora.LoraLayer.update_layer`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from raydmd.errors import UserError, nearest
from raydmd.models.adapter_files import METADATA_KEY
from raydmd.models.base import one_line

KEY = "teacher.lora"
CONFIG = "adapter_config.json"  # PEFT's, beside its weights
NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers', PEFT's
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
ENCODERS = ("text_encoder", "lora_te")


@dataclass(frozen=True)
class LoraDelta:
    """What a file adds to a layer's weight: ``scale`` B A.

    Attributes:
        down: A, [rank, in] or of a convolution [rank, in, h, w].
        up: B, [out, rank] or [out, rank, 1, 1].
        scale: of the product.
    """

    down: Tensor
    up: Tensor
    scale: float


def lora_files(path: str) -> dict[str, Path]:
    """Return the file of a LoRA, and PEFT's config where it has one, by names that do not tell where they lie.

    Args:
        path: of the file, or of a folder with one.

    Raises:
        UserError: ``teacher.lora: ...``: nothing there, several, or no safetensors.
    """
    place = Path(path)
    if place.is_dir():
        names = sorted(file.name for file in place.glob("*.safetensors"))
        chosen = [name for name in NAMES if name in names] or names
        if not chosen:
            raise UserError(f"{KEY}: '{path}' has no safetensors file")
        if len(chosen) > 1:
            raise UserError(f"{KEY}: '{path}' has {len(chosen)} safetensors files; name one of {', '.join(chosen)}")
        file = place / chosen[0]
    elif place.is_file():
        file = place
    else:
        siblings = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        close = nearest(place.name, siblings)
        raise UserError(f"{KEY}: no file or folder '{path}' on this machine{close if 'did you mean' in close else ''}")
    if file.suffix != ".safetensors":
        raise UserError(f"{KEY}: {file} is not a safetensors file; others are not read, as they may hold code")
    config = file.parent / CONFIG
    return {"lora/weights": file} | ({f"lora/{CONFIG}": config} if config.is_file() else {})


def read_lora(path: str, pipeline_class: str, component: str, network: nn.Module) -> dict[str, LoraDelta]:
    """Read a LoRA file, and hold it against a network.

    Args:
        path: of the file, or of a folder with one.
        pipeline_class: diffusers', whose loader knows the forms of other trainers for this network.
        component: the network's name in the pipeline.
        network: diffusers' model; it may be on the meta device.

    Returns:
        What is added, by names of the network's layers.

    Raises:
        UserError: ``teacher.lora: ...``: a file that cannot be read, of another kind of adapter, for other layers, or
            whose shapes differ.
    """
    files = lora_files(path)
    file, config = files["lora/weights"], files.get(f"lora/{CONFIG}")
    try:
        state, said = load_file(file), _read_metadata(file, config, component)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{KEY}: {file} is not readable as a safetensors file: {one_line(error)}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{KEY}: what {config or file} says of its adapters cannot be read") from None
    _refuse_others(file, state, said)
    state, alphas = _in_diffusers_form(file, state, pipeline_class, component, network)
    found = _deltas(file, state, alphas, said)
    _check_layers(file, found, network)
    return found


@torch.no_grad()
def fuse_teacher_lora(network: nn.Module, deltas: Mapping[str, LoraDelta]) -> None:
    """Add what `read_lora` returned to a network's own weights; sums are made in float32 and rounded once."""
    modules = dict(network.named_modules())
    for layer, delta in deltas.items():
        weight: Tensor = modules[layer].weight
        product = delta.up.float().flatten(1) @ delta.down.float().flatten(1)
        weight.copy_(weight.float() + delta.scale * product.reshape(weight.shape).to(weight.device))


def _read_metadata(file: Path, config: Path | None, component: str) -> dict[str, Any]:
    """Return PEFT's settings of the adapters, of the file itself or of the config beside it; empty where it has none.

    Raises:
        ValueError, TypeError, AttributeError: they are no record.
    """
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY)
    if text is not None:
        said = json.loads(text).items()
        return {key.removeprefix(f"{component}."): value for key, value in said}
    return dict(json.loads(config.read_text(encoding="utf-8"))) if config is not None else {}


def _refuse_others(file: Path, state: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    for name in state:
        kind = next((kind for part, kind in OTHER_KINDS.items() if part in name), None)
        if kind is not None:
            raise UserError(f"{KEY}: {file} is of {kind} ('{name}'); LoRA is needed")
        if name.startswith(ENCODERS):
            raise UserError(f"{KEY}: {file} changes the text encoder, too ('{name}'), which is not followed here; take "
                            f"one of the network alone")  # fmt: skip
    if said.get("use_dora"):
        raise UserError(f"{KEY}: {file} is of DoRA (use_dora); LoRA is needed")


def _in_diffusers_form(
    file: Path, state: dict[str, Tensor], pipeline_class: str, component: str, network: nn.Module
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return tensors by ``layer.lora_A.weight``, ``layer.lora_B.weight``, and alphas by ``layer.alpha``."""
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    alphas: dict[str, Any] = {}
    try:
        if (convert := getattr(getattr(diffusers, pipeline_class), "lora_state_dict", None)) is not None:
            more = {"unet_config": getattr(network, "config", None)} if component == "unet" else {}
            converted = convert(dict(state), **more)
            state, alphas = converted if isinstance(converted, tuple) else (converted, {})
        if not any(DOWN in name for name in state):
            state = convert_unet_state_dict_to_peft(state)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{KEY}: {file} is in no form that diffusers knows: {one_line(error)}") from None
    own = f"{component}."
    tensors = {name.removeprefix(own): value for name, value in state.items()}
    numbers = {name.removeprefix(own): float(value) for name, value in (alphas or {}).items()}
    numbers |= {name: float(value) for name, value in tensors.items() if name.endswith(ALPHA)}
    return {name: value for name, value in tensors.items() if not name.endswith(ALPHA)}, numbers


def _deltas(
    file: Path, state: Mapping[str, Tensor], alphas: Mapping[str, float], said: Mapping[str, Any]
) -> dict[str, LoraDelta]:
    found: dict[str, LoraDelta] = {}
    for name in state:
        layer = name.removesuffix(DOWN).removesuffix(UP)
        if layer == name or f"{layer}{DOWN}" not in state or f"{layer}{UP}" not in state:
            raise UserError(f"{KEY}: {file} has a tensor '{name}' that is not one of a pair of lora_A and lora_B")
        down, up = state[f"{layer}{DOWN}"], state[f"{layer}{UP}"]
        rank, patterns = down.shape[0], said.get("alpha_pattern") or {}
        alpha = next((value for part, value in patterns.items() if re.match(rf"(.*\.)?({part})$", layer)), None)
        alpha = alphas.get(f"{layer}{ALPHA}", said.get("lora_alpha") if alpha is None else alpha)
        if up.ndim < 2 or up.shape[1] != rank or up.shape[2:].numel() != 1:
            raise UserError(f"{KEY}: {file}: '{layer}' has lora_A {list(down.shape)} and lora_B {list(up.shape)}, "
                            f"which are of two ranks")  # fmt: skip
        size = math.sqrt(rank) if said.get("use_rslora") else rank
        found[layer] = LoraDelta(down, up, 1.0 if alpha is None else float(alpha) / size)
    return found


def _check_layers(file: Path, found: Mapping[str, LoraDelta], network: nn.Module) -> None:
    kind = type(network).__name__
    weights = {name: weight for name, module in network.named_modules()
               if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim > 1}  # fmt: skip
    unknown = [layer for layer in found if layer not in weights]
    if not found or len(unknown) == len(found):
        example = f", e.g. '{unknown[0]}'" if unknown else ""
        raise UserError(f"{KEY}: {file} matches no layer of the teacher's {kind}{example}: it is of another model")
    if unknown:
        raise UserError(f"{KEY}: {file} has {len(unknown)} layers that the teacher's {kind} has not, e.g. "
                        f"'{unknown[0]}'")  # fmt: skip
    for layer, delta in found.items():
        there = (delta.up.shape[0], *delta.down.shape[1:])
        if tuple(weights[layer].shape) != there:
            raise UserError(f"{KEY}: {file}: '{layer}' is for a weight of {list(there)}, but the teacher's is "
                            f"{list(weights[layer].shape)}")  # fmt: skip
