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
from raydmd.models.experts import fuse_lora

ADAPTERS = "adapters"


def write(plan: Plan, folder: Path) -> list[str]:
    """Write the pipeline into ``folder``; return what is to be said of it.

    One expert is the pipeline's network. Two are the two networks of a pipeline that has them (Wan's, with its
    ``boundary_ratio``). Otherwise adapters lie beside the teacher's network, and whole networks beside the first;
    the loading code has a callback that changes them.

    Raises:
        UserError: an expert does not fit the teacher.
        StorageError: the disk is full or gone.
    """
    config: dict[str, Any] = {}
    if plan.family.second_network is not None:
        config["boundary_ratio"] = plan.boundary_ratio if plan.shares_boundary else None
    parts, said = [plan.component, *_others(plan)], []
    if _keeps_adapters(plan):
        source = plan.family.teacher_folder()
        source.fetch_weights(plan.family.options["variant"])
        link_part(source.network, folder / plan.component, plan.family.options["variant"])
        for name, state in zip(plan.names, plan.states, strict=True):
            write_lora(plan, state, folder / ADAPTERS / f"{name}.safetensors")
    else:
        for index, part in enumerate(parts):
            said += _write_network(plan, index, folder / part)
            gc.collect()  # one of them in memory is enough
    shared = parts if plan.shares_boundary else parts[:1]
    write_pipeline(plan, folder, {part: plan.family.network_class for part in shared}, config)
    return said


def code(plan: Plan) -> str:
    """Return the lines that load it."""
    if _keeps_adapters(plan):
        loads = [
            f'pipe.load_lora_weights(folder, weight_name="{ADAPTERS}/{name}.safetensors", adapter_name="{name}")'
            for name in plan.names
        ]
        return loading_code(plan, loads)
    return loading_code(plan, swapped=[] if plan.shares_boundary else _others(plan))


def _others(plan: Plan) -> list[str]:
    """Return the parts that hold the experts after the first."""
    if plan.shares_boundary:
        assert plan.family.second_network is not None
        return [plan.family.second_network]
    return [f"{plan.component}_{number}" for number in range(2, len(plan.phases) + 1)]


def _keeps_adapters(plan: Plan) -> bool:
    return plan.is_lora and len(plan.phases) > 1 and not plan.shares_boundary


def _write_network(plan: Plan, index: int, folder: Path) -> list[str]:
    """Write an expert as a network of diffusers: in float32 where an adapter would be lost by rounding."""
    adapter, state, said = plan.adapter, plan.states[index], []
    network: Any = plan.family.load_teacher()
    if plan.is_lora:
        try:
            fuse_lora(network, state, adapter.rank, adapter.alpha)
        except UserError:
            if plan.dtype == "float32":
                raise
            full = type(plan.family)(plan.family.path, {**plan.family.given, "dtype": "float32"})
            network = fuse_lora(full.load_teacher(), state, adapter.rank, adapter.alpha)
            said.append(f"{folder.name} is in float32: in {plan.dtype} rounding would take too much of its adapter's "
                        f"effect")  # fmt: skip
    else:
        network.load_state_dict(state)
    with writing(folder):
        network.network.save_pretrained(folder)
    return said
