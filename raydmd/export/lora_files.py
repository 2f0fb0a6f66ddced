"""The format ``lora``: diffusers' own LoRA files, which ``load_lora_weights`` takes with their rank and alpha."""

import json
from pathlib import Path

from safetensors.torch import save

from raydmd.atomic import write_bytes
from raydmd.export.loading_code import loading_code, lora_loads
from raydmd.export.plan import Plan
from raydmd.export.segment import Segment
from raydmd.models.adapter_files import METADATA_KEY
from raydmd.models.diffusers.pipeline_folder import DTYPES

SINGLE = "pytorch_lora_weights.safetensors"  # diffusers' name of the only file


def write(plan: Plan, folder: Path) -> None:
    """Write a file a segment into ``folder``: an expert's, or one of each of its networks.

    Raises:
        StorageError: the disk is full or gone.
    """
    for file, segment in zip(file_names(plan), plan.segments, strict=True):
        write_lora(plan, segment, folder / file)


def code(plan: Plan) -> str:
    """Return the lines that load it."""
    return loading_code(plan, lora_loads(plan, file_names(plan)))


def places(plan: Plan) -> list[str]:
    """Return where each segment lies in the folder, in order."""
    return file_names(plan)


def file_names(plan: Plan) -> list[str]:
    """Return the segments' files in order."""
    return [SINGLE] if len(plan.segments) == 1 else [f"{segment.name}.safetensors" for segment in plan.segments]


def write_lora(plan: Plan, segment: Segment, file: Path) -> None:
    """Write one adapter: names begin with the pipeline's part, and the metadata have rank, alpha and the layers.

    Without the metadata diffusers takes alpha to be the rank. Of a pipeline's second network the names begin with the
    first's part, too: the loader is told where they go.

    Raises:
        StorageError: the disk is full or gone.
    """
    layers, dtype = plan.layers(segment), DTYPES[plan.dtype]
    tensors = {}
    for layer, (down, up) in layers.items():
        tensors[f"{plan.component}.{layer}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"{plan.component}.{layer}.lora_B.weight"] = up.to(dtype).contiguous()
    config = {"r": plan.adapter.rank, "lora_alpha": plan.adapter.alpha, "target_modules": sorted(layers)}
    said = {f"{plan.component}.{key}": value for key, value in config.items()}
    write_bytes(file, save(tensors, {"format": "pt", METADATA_KEY: json.dumps(said, sort_keys=True)}))
