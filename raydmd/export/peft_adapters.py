"""The format ``peft``: a folder an expert with adapter_config.json, which ``PeftModel.from_pretrained`` takes."""

from pathlib import Path
from typing import Any

from safetensors.torch import save

from raydmd.atomic import write_bytes, writing
from raydmd.export.loading_code import loading_code, peft_variable
from raydmd.export.plan import Plan
from raydmd.models.diffusers.pipeline_folder import DTYPES

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in PEFT's files


def write(plan: Plan, folder: Path) -> None:
    """Write a folder a segment into ``folder``.

    Raises:
        StorageError: the disk is full or gone.
    """
    from peft import LoraConfig

    alpha: Any = plan.adapter.alpha  # PEFT takes any number, though it says int
    for segment in plan.segments:
        name, layers, dtype, tensors = segment.name, plan.layers(segment), DTYPES[plan.dtype], {}
        for layer, (down, up) in layers.items():
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = down.to(dtype).contiguous()
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = up.to(dtype).contiguous()
        config = LoraConfig(
            r=plan.adapter.rank, lora_alpha=alpha, target_modules=sorted(layers), lora_dropout=0.0,
            inference_mode=True, base_model_name_or_path=plan.base,
        )  # fmt: skip
        with writing(folder / name):
            (folder / name).mkdir(parents=True)
            config.save_pretrained(str(folder / name))
        write_bytes(folder / name / WEIGHTS, save(tensors, {"format": "pt"}))


def code(plan: Plan) -> str:
    """Return the lines that load it: PEFT puts its layers into the pipeline's own networks."""
    loads, seen = list[str](), set[str]()
    for segment in plan.segments:
        network, name = peft_variable(plan, segment), segment.name
        where = f'folder, subfolder="{name}", adapter_name="{name}"'
        if segment.component in seen:
            loads.append(f"{network}.load_adapter({where})")
        else:
            loads.append(f"{network} = PeftModel.from_pretrained(pipe.{segment.component}, {where})")
        seen.add(segment.component)
    return loading_code(plan, loads, imports=["from peft import PeftModel"])


def places(plan: Plan) -> list[str]:
    """Return where each segment lies in the folder, in order."""
    return [segment.name for segment in plan.segments]
