"""The format ``diffusers``: a pipeline's folder that ``from_pretrained`` loads, the teacher's other parts in it."""

import gc
from pathlib import Path
from typing import Any

from raydmd.atomic import writing
from raydmd.errors import UserError
from raydmd.export.loading_code import loading_code
from raydmd.export.lora_files import write_lora
from raydmd.export.pipeline_folder import link_part, write_pipeline
from raydmd.export.plan import Plan
from raydmd.models.diffusers.teacher_folder import CONFIG
from raydmd.models.experts import fuse_lora

ADAPTERS = "adapters"


def write(plan: Plan, folder: Path) -> None:
    """Write the pipeline into ``folder``.

    One expert is the pipeline's network. Two are the two networks of a pipeline that has them (Wan's, with its
    ``boundary_ratio``). Otherwise adapters lie beside the teacher's network, and whole networks beside the first;
    the loading code has a callback that changes them.

    Raises:
        UserError: an expert does not fit the teacher, or would be lost by rounding.
        StorageError: the disk is full or gone.
    """
    config: dict[str, Any] = {}
    if plan.family.second_network is not None:
        config["boundary_ratio"] = plan.boundary_ratio if plan.shares_boundary else None
    parts = [plan.component, *_others(plan)]
    if plan.keeps_adapters:
        source = plan.family.teacher_folder()
        source.fetch_weights(plan.family.options["variant"])
        link_part(source.network, folder / plan.component, plan.family.options["variant"])
        for name, state in zip(plan.names, plan.states, strict=True):
            write_lora(plan, state, folder / ADAPTERS / f"{name}.safetensors")
    else:
        for index, part in enumerate(parts):
            _write_network(plan, index, folder / part)
            gc.collect()  # one of them in memory is enough
    shared = parts if plan.shares_boundary else parts[:1]
    write_pipeline(plan, folder, {part: plan.family.network_class for part in shared}, config)


def code(plan: Plan) -> str:
    """Return the lines that load it."""
    if plan.keeps_adapters:
        loads = [
            f'pipe.load_lora_weights(folder, weight_name="{ADAPTERS}/{name}.safetensors", adapter_name="{name}")'
            for name in plan.names
        ]
        return loading_code(plan, loads)
    return loading_code(plan, swapped=[] if plan.shares_boundary else _others(plan))


def places(plan: Plan) -> list[str]:
    """Return where each expert lies in the folder, in order."""
    if plan.keeps_adapters:
        return [f"{ADAPTERS}/{name}.safetensors" for name in plan.names]
    return [plan.component, *_others(plan)]


def _others(plan: Plan) -> list[str]:
    """Return the parts that hold the experts after the first."""
    if plan.shares_boundary:
        assert plan.family.second_network is not None
        return [plan.family.second_network]
    return [f"{plan.component}_{number}" for number in range(2, len(plan.phases) + 1)]


def _write_network(plan: Plan, index: int, folder: Path) -> None:
    """Write an expert as a network of diffusers.

    Raises:
        UserError: it does not fit the teacher, or rounding to half precision takes too much of an adapter's effect.
    """
    adapter, state = plan.adapter, plan.states[index]
    network: Any = plan.family.load_teacher()
    if not plan.is_lora:
        network.load_state_dict(state)
    else:
        try:
            fuse_lora(network, state, adapter.rank, adapter.alpha)
        except UserError as error:
            if plan.dtype == "float32":
                raise
            raise UserError(f"--dtype {plan.dtype}: in it, rounding takes too much of the adapters' effect on the "
                            f"weights; use --dtype float32, or --format lora") from error  # fmt: skip
    with writing(folder):
        network.network.save_pretrained(folder)
        for file in folder.iterdir():  # safetensors makes its own unreadable for others
            file.chmod((folder / CONFIG).stat().st_mode)
