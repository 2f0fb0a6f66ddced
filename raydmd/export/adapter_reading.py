"""Adapters of an export, in the names and shapes in which a run keeps its experts (`Experts.state`)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raydmd.errors import UserError
from raydmd.export.lightning_files import PREFIX as ORIGINAL
from raydmd.export.peft_adapters import PREFIX as PEFT
from raydmd.export.peft_adapters import WEIGHTS
from raydmd.models.adapter_files import Adapter, read_adapter
from raydmd.models.base import one_line
from raydmd.runs.folders import EXPORT

PARTS = {"lora_down": "lora_A", "lora_up": "lora_B"}
Layers = Mapping[str, str]
"""A layer's name in the network, with the part's, by that in the file."""


def read_state(format: str, place: Path, adapter: Adapter, layers: Callable[[], Layers]) -> dict[str, Tensor]:
    """Return an expert's weights.

    Args:
        format: of the export.
        place: the expert's file, or its folder.
        adapter: what they are said to be.
        layers: called for the names of formats that do not have the network's own.

    Raises:
        UserError: it cannot be read, or has another rank or alpha, or other layers.
    """
    file = place / WEIGHTS if format == "peft" else place
    said: Adapter | None
    try:
        tensors = load_file(file)
        if format == "lightning":
            said, state = _lightning(tensors, layers())
        elif format == "peft":
            config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
            said, state = Adapter(int(config["r"]), float(config["lora_alpha"])), _peft(tensors, layers())
        else:
            said, state = read_adapter(file), tensors
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    except KeyError as error:
        raise UserError(f"{file}: {error} is missing, or not a layer of the base model") from None
    if said != adapter:
        found = "no rank and alpha" if said is None else f"rank {said.rank} and alpha {said.alpha:g}"
        raise UserError(f"{file}: its adapters have {found}, and {EXPORT} says rank {adapter.rank} and alpha "
                        f"{adapter.alpha:g}")  # fmt: skip
    return state


def _lightning(tensors: Mapping[str, Tensor], layers: Layers) -> tuple[Adapter, dict[str, Tensor]]:
    """Return rank and alpha, the same for all layers, and the weights.

    Raises:
        KeyError: a layer that the network has not.
        ValueError: layers differ in rank or alpha.
    """
    state, found = {}, set()
    for name, value in tensors.items():
        layer, _, part = name.removeprefix(ORIGINAL).removesuffix(".weight").rpartition(".")
        if part == "alpha":
            down = tensors[f"{ORIGINAL}{layer}.lora_down.weight"]
            found.add(Adapter(down.shape[0], float(value)))
        else:
            state[f"{layers[layer]}.{PARTS[part]}.weight"] = value
    if len(found) != 1:
        raise ValueError(f"its layers have {len(found)} ranks and alphas, not one")
    return found.pop(), state


def _peft(tensors: Mapping[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """Return the weights.

    Raises:
        KeyError: a layer that the network has not.
    """
    state = {}
    for name, value in tensors.items():
        layer, _, part = name.removeprefix(PEFT).rpartition(".lora_")
        state[f"{layers[layer]}.lora_{part}"] = value
    return state
