"""The format ``lightning``: single files with the model's own names, as Lightning releases and ComfyUI have them."""

from pathlib import Path

import torch
from safetensors.torch import save

from raydmd.atomic import write_bytes
from raydmd.export.loading_code import loading_code, lora_loads
from raydmd.export.plan import Plan
from raydmd.models.diffusers.pipeline_folder import DTYPES

PREFIX = "diffusion_model."  # ComfyUI's, before the layers' names
TWO = ("high_noise_model.safetensors", "low_noise_model.safetensors")  # as Wan2.2-Lightning names its files


def write(plan: Plan, folder: Path) -> None:
    """Write a file a segment into ``folder``: ``lora_down`` [r, in], ``lora_up`` [out, r] and ``alpha`` of each layer.

    Raises:
        StorageError: the disk is full or gone.
    """
    for file, segment in zip(file_names(plan), plan.segments, strict=True):
        dtype, tensors = DTYPES[plan.dtype], {}
        for layer, (down, up) in plan.layers(segment).items():
            name = f"{PREFIX}{plan.family.original_layer(layer)}"
            tensors[f"{name}.lora_down.weight"] = down.to(dtype).contiguous()
            tensors[f"{name}.lora_up.weight"] = up.to(dtype).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(plan.adapter.alpha))
        write_bytes(folder / file, save(tensors, {"format": "pt"}))


def code(plan: Plan) -> str:
    """Return the lines that load it with diffusers, which turns the names back."""
    return loading_code(plan, lora_loads(plan, file_names(plan)))


def places(plan: Plan) -> list[str]:
    """Return where each segment lies in the folder, in order."""
    return list(file_names(plan))


def file_names(plan: Plan) -> tuple[str, ...]:
    """Return the segments' files in order."""
    count = len(plan.segments)
    named = tuple(f"{segment.name}.safetensors" for segment in plan.segments)
    return ("lora.safetensors",) if count == 1 else TWO if count == 2 else named
