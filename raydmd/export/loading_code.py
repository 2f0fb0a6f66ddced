"""The Python that loads an export with plain diffusers: the model card shows it, and the check runs the same lines."""

import json
from collections.abc import Sequence
from typing import Any

from raydmd.export.pipeline_folder import absent_parts
from raydmd.export.plan import Plan

Lines = list[str]


def loading_code(
    plan: Plan, adapters: Sequence[str] = (), swapped: Sequence[str] = (), imports: Lines | None = None
) -> str:
    """Return lines that make ``pipe``, and ``switch`` where it is to be called after each step.

    They use ``folder``, ``dtype`` and, for adapters on a teacher of its own, ``base``.

    Args:
        plan: of the export.
        adapters: one line for each expert that loads its adapter under its name; none where experts are networks.
        swapped: parts of the folder that hold the experts after the first, where a callback changes networks.
        imports: further ones.
    """
    lines = [
        *(["from functools import partial"] if plan.sampler.sigmas else []),
        "import torch",
        f"from diffusers import {', '.join(sorted(_classes(plan, swapped)))}",
        *(imports or []),
        "",
    ]
    absent = "".join(f", {part}=None" for part in absent_parts(plan))
    if plan.format == "diffusers":
        lines.append(f"pipe = {plan.pipeline}.from_pretrained(folder, torch_dtype=dtype{absent})")
    else:
        variant = plan.family.options["variant"]
        more = f", variant={_quoted(variant)}{absent}" if variant else absent
        lines.append(f"pipe = {plan.pipeline}.from_pretrained(base, torch_dtype=dtype{more})")
    if _sets_scheduler(plan):
        config = ", ".join(f"{key}={value!r}" for key, value in plan.sampler.config.items())
        lines.append(f"pipe.scheduler = {plan.sampler.scheduler}({config})")
    if plan.sampler.sigmas:
        lines.append(f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, "
                     f"sigmas={list(plan.sampler.sigmas)})")  # fmt: skip
    lines += adapters
    if swapped:
        lines += _swapping(plan, swapped)
    elif len(adapters) > 1:
        lines += _switching(plan)
    return "\n".join(lines) + "\n"


def call_code(plan: Plan, given: Sequence[str], switched: bool) -> str:
    """Return the pipeline's call on the arguments ``given``, which stand before the trained ones."""
    trained = ", ".join(f"{name}={value!r}" for name, value in call_arguments(plan).items())
    lines = [*given, trained, *["callback_on_step_end=switch"] * switched]
    return "pipe(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def call_arguments(plan: Plan) -> dict[str, Any]:
    """Return the arguments of the trained steps: their number or times, no guidance, and the size."""
    width, height = plan.family.picture_size
    size: dict[str, Any] = {"height": height, "width": width}
    if plan.family.frames > 1:
        size["num_frames"] = plan.family.frames
    return {**plan.sampler.call, **plan.family.unguided, **size}


def _sets_scheduler(plan: Plan) -> bool:
    """Whether the scheduler is made by these lines: the folder has another one."""
    return plan.format != "diffusers" or plan.sampler.shipped is not None


def _classes(plan: Plan, swapped: Sequence[str]) -> set[str]:
    found = {plan.pipeline}
    if _sets_scheduler(plan):
        found.add(plan.sampler.scheduler)
    if swapped:
        found.add(plan.family.network_class)
    return found


def _switching(plan: Plan) -> Lines:
    """Return lines that change the adapter after the last step of each expert."""
    setter = "network.set_adapter" if plan.format == "peft" else "pipe.set_adapters"
    return [
        f'{setter}("{plan.names[0]}")',
        f"next_expert = {_table(plan)}  # by the number of steps made",
        "",
        "def switch(pipe, step, timestep, tensors):",
        "    if step + 1 in next_expert:",
        f"        {setter}(next_expert[step + 1])",
        "    return tensors",
    ]


def _swapping(plan: Plan, swapped: Sequence[str]) -> Lines:
    """Return lines that change the network after the last step of each expert."""
    load = f"{plan.family.network_class}.from_pretrained(folder, subfolder={{}}, torch_dtype=dtype)"
    lines = [f'experts = {{"{plan.names[0]}": pipe.{plan.component}}}']
    lines += [
        f'experts["{name}"] = {load.format(_quoted(part))}' for name, part in zip(plan.names[1:], swapped, strict=True)
    ]
    return [
        *lines,
        f"next_expert = {_table(plan)}  # by the number of steps made",
        "",
        "def switch(pipe, step, timestep, tensors):",
        "    if step + 1 in next_expert:",
        f"        pipe.{plan.component} = experts[next_expert[step + 1]]",
        "    return tensors",
    ]


def _table(plan: Plan) -> str:
    return "{" + ", ".join(f"{step}: {_quoted(name)}" for step, name in plan.begins.items()) + "}"


def _quoted(text: str) -> str:
    return json.dumps(text)
