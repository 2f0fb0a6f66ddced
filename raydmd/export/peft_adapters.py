"""The format ``peft``: a folder an expert with adapter_config.json, which ``PeftModel.from_pretrained`` takes."""

from pathlib import Path
from typing import Any

from safetensors.torch import save

from raydmd.atomic import write_bytes, writing
from raydmd.export.loading_code import loading_code
from raydmd.export.plan import Plan
from raydmd.models.diffusers.pipeline_folder import DTYPES

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in PEFT's files


def write(plan: Plan, folder: Path) -> None:
    """Write a folder an expert into ``folder``.

    Raises:
        StorageError: the disk is full or gone.
    """
    from peft import LoraConfig

    alpha: Any = plan.adapter.alpha  # PEFT takes any number, though it says int
    for name, state in zip(plan.names, plan.states, strict=True):
        layers, dtype, tensors = plan.layers(state), DTYPES[plan.dtype], {}
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
    """Return the lines that load it: PEFT puts its layers into the pipeline's own network."""
    first, *others = plan.names
    loads = [
        f'network = PeftModel.from_pretrained(pipe.{plan.component}, folder, subfolder="{first}", '
        f'adapter_name="{first}")',
        *(f'network.load_adapter(folder, subfolder="{name}", adapter_name="{name}")' for name in others),
    ]
    return loading_code(plan, loads, imports=["from peft import PeftModel"])
