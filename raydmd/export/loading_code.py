"""The Python that loads an export with plain diffusers: the model card shows it, and the check runs the same lines."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from raydmd.export.pipeline_folder import absent_parts
from raydmd.export.plan import Plan
from raydmd.export.segment import Segment

Lines = list[str]


def loading_code(
    plan: Plan, adapters: Sequence[str] = (), swapped: Sequence[str] = (), imports: Lines | None = None
) -> str:
    """Return lines that make ``pipe``, and ``switch`` where it is to be called after each step.

    They use ``folder``, ``dtype`` and, for adapters on a teacher of its own, ``base``.

    Args:
        plan: of the export.
        adapters: one line for each segment that loads its adapter under its name; none where they are networks.
        swapped: parts of the folder that hold the segments after the first, where a callback changes networks.
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
        lines.append(f"pipe = {plan.pipeline}.from_pretrained(base, torch_dtype=dtype{more}{_networks(plan)})")
    if plan.format != "diffusers":
        config = ", ".join(f"{key}={value!r}" for key, value in plan.sampler.config.items())
        lines.append(f"pipe.scheduler = {plan.sampler.scheduler}({config})")
    if plan.sampler.sigmas:
        lines.append(f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, "
                     f"sigmas={list(plan.sampler.sigmas)})")  # fmt: skip
    lines += adapters
    if swapped:
        lines += _swapping(plan, swapped)
    elif adapters:
        lines += _switching(plan)
    return "\n".join(lines) + "\n"


def lora_loads(plan: Plan, files: Sequence[str]) -> Lines:
    """Return lines that load a LoRA file for each segment into its network, under the segment's name."""
    found = []
    for segment, file in zip(plan.segments, files, strict=True):
        second = f", load_into_{segment.component}=True" if segment.component != plan.component else ""
        found.append(f'pipe.load_lora_weights(folder, weight_name="{file}", adapter_name="{segment.name}"{second})')
    return found


def peft_variable(plan: Plan, segment: Segment) -> str:
    """Return the name that a segment's network has in these lines, with PEFT's layers in it."""
    return segment.component.replace(plan.component, "network", 1)


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


def pipeline_arguments(plan: Plan) -> Mapping[str, inspect.Parameter]:
    """Return the arguments that the pipeline's call takes."""
    import diffusers

    return inspect.signature(getattr(diffusers, plan.pipeline).__call__).parameters


def _classes(plan: Plan, swapped: Sequence[str]) -> set[str]:
    found = {plan.pipeline}
    if plan.format != "diffusers":
        found.add(plan.sampler.scheduler)
    if swapped or f"{plan.family.network_class}." in _networks(plan):
        found.add(plan.family.network_class)
    return found


def _networks(plan: Plan) -> str:
    """Return the arguments that take the teacher's networks, where the pipeline has two.

    Its boundary is the student's. A network that makes no step is left out.
    """
    second, found = plan.family.second_network, ""
    if not plan.takes_both and not plan.leaves_one:
        return found
    if (own := plan.family.options["subfolder"]) != plan.component:  # the second is the teacher
        variant = plan.family.options["variant"]
        more = f", variant={_quoted(variant)}" if variant else ""
        found = (f", {plan.component}={plan.family.network_class}.from_pretrained(base, subfolder={_quoted(own)}, "
                 f"torch_dtype=dtype{more})")  # fmt: skip
    if len(plan.components) == 1:
        found += f", {second}=None"
    return f"{found}, boundary_ratio={plan.boundary_ratio!r}"


def _switching(plan: Plan) -> Lines:
    """Return lines that change the adapter after the last step of each segment, where a network has several."""
    if len(plan.segments) == len(plan.components):
        return []
    if len(plan.components) > 1:
        return _switching_several(plan)
    setter = "network.set_adapter" if plan.format == "peft" else "pipe.set_adapters"
    return [
        f'{setter}("{plan.segments[0].name}")',
        f"next_expert = {_table(plan)}  # by the number of steps made",
        "",
        "def switch(pipe, step, timestep, tensors):",
        "    if step + 1 in next_expert:",
        f"        {setter}(next_expert[step + 1])",
        "    return tensors",
    ]


def _switching_several(plan: Plan) -> Lines:
    """Return the same where each of the pipeline's two networks has adapters."""
    of = {part: [each.name for each in plan.segments if each.component == part] for part in plan.components}
    firsts = [names[0] for names in of.values() if len(names) > 1]
    begun, made = dict[int, Lines](), 0
    for segment in plan.segments:
        if segment.name != of[segment.component][0]:
            begun[made] = [segment.name]
        made += len(segment.times)
    begun[made] = firsts
    peft = plan.format == "peft"
    held = ", ".join(
        f"{_quoted(each.name)}: {peft_variable(plan, each) if peft else f'pipe.{each.component}'}"
        for each in plan.segments
    )
    table = ", ".join(f"{step}: {json.dumps(these)}" for step, these in begun.items())
    return [
        f"networks = {{{held}}}",
        *(f"networks[{_quoted(name)}].set_adapter({_quoted(name)})" for name in firsts),
        f"next_experts = {{{table}}}  # by the number of steps made",
        "",
        "def switch(pipe, step, timestep, tensors):",
        "    for name in next_experts.get(step + 1, []):",
        "        networks[name].set_adapter(name)",
        "    return tensors",
    ]


def _swapping(plan: Plan, swapped: Sequence[str]) -> Lines:
    """Return lines that change the network after the last step of each segment."""
    names = [segment.name for segment in plan.segments]
    load = f"{plan.family.network_class}.from_pretrained(folder, subfolder={{}}, torch_dtype=dtype)"
    lines = [f'experts = {{"{names[0]}": pipe.{plan.component}}}']
    lines += [
        f'experts["{name}"] = {load.format(_quoted(part))}' for name, part in zip(names[1:], swapped, strict=True)
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
