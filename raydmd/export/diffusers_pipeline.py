"""The format ``diffusers``: a pipeline's folder that ``from_pretrained`` loads, the teacher's other parts in it."""

import gc
from pathlib import Path
from typing import Any

from raydmd.atomic import writing
from raydmd.errors import UserError
from raydmd.export.loading_code import loading_code, lora_loads
from raydmd.export.lora_files import write_lora
from raydmd.export.pipeline_folder import link_part, write_pipeline
from raydmd.export.plan import Plan
from raydmd.export.segment import Segment
from raydmd.models.diffusers.teacher_folder import CONFIG
from raydmd.models.experts import fuse_lora

ADAPTERS = "adapters"


def write(plan: Plan, folder: Path) -> None:
    """Write the pipeline into ``folder``.

    One network is the pipeline's. Two (of one expert each, or those of one expert) are the two networks of a pipeline
    that has them (Wan's, with its ``boundary_ratio``). Otherwise adapters lie beside the teacher's networks, and whole
    networks beside the first; the loading code has a callback that changes them.

    Raises:
        UserError: an expert does not fit the teacher, or would be lost by rounding.
        StorageError: the disk is full or gone.
    """
    config: dict[str, Any] = {}
    if plan.family.second_network is not None:
        config["boundary_ratio"] = plan.boundary_ratio
    if plan.keeps_adapters:
        plan.family.teacher_folder().fetch_weights(plan.family.options["variant"])
        for part in plan.components:
            link_part(plan.networks[part], folder / part, plan.family.options["variant"])
        for segment in plan.segments:
            write_lora(plan, segment, folder / ADAPTERS / f"{segment.name}.safetensors")
        shared = plan.components
    else:
        parts = [plan.component, *_others(plan)]
        for segment, part in zip(plan.segments, parts, strict=True):
            _write_network(plan, segment, folder / part)
            gc.collect()  # one of them in memory is enough
        shared = parts if plan.shares_boundary else parts[:1]
    write_pipeline(plan, folder, {part: plan.family.network_class for part in shared}, config)


def code(plan: Plan) -> str:
    """Return the lines that load it."""
    if plan.keeps_adapters:
        return loading_code(plan, lora_loads(plan, [f"{ADAPTERS}/{each.name}.safetensors" for each in plan.segments]))
    return loading_code(plan, swapped=[] if plan.shares_boundary else _others(plan))


def places(plan: Plan) -> list[str]:
    """Return where each segment lies in the folder, in order."""
    if plan.keeps_adapters:
        return [f"{ADAPTERS}/{segment.name}.safetensors" for segment in plan.segments]
    return [plan.component, *_others(plan)]


def _others(plan: Plan) -> list[str]:
    """Return the parts that hold the segments after the first."""
    if plan.shares_boundary:
        assert plan.family.second_network is not None
        return [plan.family.second_network]
    return [f"{plan.component}_{number}" for number in range(2, len(plan.segments) + 1)]


def _write_network(plan: Plan, segment: Segment, folder: Path) -> None:
    """Write a segment's network as one of diffusers.

    Raises:
        UserError: it does not fit the teacher, or rounding to half precision takes too much of an adapter's effect.
    """
    adapter, state = plan.adapter, plan.state_of(segment)
    parts: Any = plan.family.load_teacher().parts
    network = next(part for part in parts if part.component == segment.component)
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
