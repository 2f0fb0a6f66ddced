"""The format ``lora``: diffusers' own LoRA files, which ``load_lora_weights`` takes with their rank and alpha."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from raydmd.atomic import write_bytes
from raydmd.export.loading_code import loading_code
from raydmd.export.plan import Plan
from raydmd.models.adapter_files import METADATA_KEY
from raydmd.models.diffusers.pipeline_folder import DTYPES

SINGLE = "pytorch_lora_weights.safetensors"  # diffusers' name of the only file


def write(plan: Plan, folder: Path) -> None:
    """Write a file an expert into ``folder``.

    Raises:
        StorageError: the disk is full or gone.
    """
    for file, state in zip(file_names(plan), plan.states, strict=True):
        write_lora(plan, state, folder / file)


def code(plan: Plan) -> str:
    """Return the lines that load it."""
    loads = [
        f'pipe.load_lora_weights(folder, weight_name="{file}", adapter_name="{name}")'
        for file, name in zip(file_names(plan), plan.names, strict=True)
    ]
    return loading_code(plan, loads)


def file_names(plan: Plan) -> list[str]:
    """Return the experts' files in order."""
    return [SINGLE] if len(plan.phases) == 1 else [f"{name}.safetensors" for name in plan.names]


def write_lora(plan: Plan, state: Mapping[str, Tensor], file: Path) -> None:
    """Write one adapter: names begin with the pipeline's part, and the metadata have rank, alpha and the layers.

    Without the metadata diffusers takes alpha to be the rank.

    Raises:
        StorageError: the disk is full or gone.
    """
    layers, dtype = plan.layers(state), DTYPES[plan.dtype]
    tensors = {}
    for layer, (down, up) in layers.items():
        tensors[f"{plan.component}.{layer}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"{plan.component}.{layer}.lora_B.weight"] = up.to(dtype).contiguous()
    config = {"r": plan.adapter.rank, "lora_alpha": plan.adapter.alpha, "target_modules": sorted(layers)}
    said = {f"{plan.component}.{key}": value for key, value in config.items()}
    write_bytes(file, save(tensors, {"format": "pt", METADATA_KEY: json.dumps(said, sort_keys=True)}))
