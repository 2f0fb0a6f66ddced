"""What is exported of a run, and how plain diffusers samples it: all that can be wrong is found here first."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydmd.errors import UserError, nearest
from raydmd.export.schedulers import visits
from raydmd.export.segment import Segment
from raydmd.models.diffusers.hub import HUB, parse_hub_name
from raydmd.models.diffusers.pipeline_folder import DTYPES
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.student_sampler import Sampler
from raydmd.models.diffusers.teacher_folder import has_second
from raydmd.runs.expert_index import check_expert, read_index
from raydmd.runs.run import Run
from raydmd.sampling.phase import Phase

FORMATS = ("diffusers", "lora", "peft", "lightning")
LARGEST_DIFFERENCE = 1e-5
"""Of latents between plain diffusers and the run, in float32; more where latents are above 1, by that."""
HALF_DIFFERENCE = 0.05
"""Largest difference of latents by their norm, in half precision: it rounds in other places than the run does."""


@dataclass(frozen=True)
class Plan:
    """An export.

    Attributes:
        run: what is exported.
        family: the run's, with the network in ``dtype``.
        format: one of `FORMATS`.
        dtype: of the weights, by name.
        pipeline: diffusers' class.
        sampler: the scheduler and the arguments of the trained times.
    """

    run: Run
    family: PretrainedFamily
    format: str
    dtype: str
    pipeline: str
    sampler: Sampler

    @property
    def phases(self) -> list[Phase]:
        """The run's phases; all of them are trained."""
        return self.run.phases

    @property
    def times(self) -> list[float]:
        """The trained times, falling from t_max to 0."""
        return trained_times(self.phases)

    @property
    def names(self) -> list[str]:
        """The experts' names in order: ``phase-1`` ..."""
        return [f"phase-{phase.index + 1}" for phase in self.phases]

    @cached_property
    def segments(self) -> list[Segment]:
        """The steps, cut where another expert or another network of the teacher makes them.

        A network of an expert that makes none of the steps is in none of them.
        """
        teacher = self.family.outline() if self.takes_both else None
        found = []
        for phase, expert in zip(self.phases, self.names, strict=True):
            own = None if teacher is None else teacher.for_interval(*phase.interval)

            def part(t: float, own: Any = own) -> str:
                if own is None:
                    return self.component
                number = own.part_of(torch.tensor([t], dtype=torch.float64))
                return str((own if number is None else own.parts[int(number)]).component)

            runs = [(component, tuple(times)) for component, times in groupby(phase.times[:-1], key=part)]
            for component, times in runs:
                name = expert if len(runs) == 1 else f"{expert}-{component}"
                found.append(Segment(name, phase.index, component, times))
        return found

    @property
    def begins(self) -> dict[int, str]:
        """By the number of steps made, the name of the segment that is next; the first one's again after the last."""
        made, found = 0, {}
        for segment, after in zip(self.segments, [*self.segments[1:], self.segments[0]], strict=True):
            made += len(segment.times)
            found[made] = after.name
        return found

    @property
    def components(self) -> list[str]:
        """The networks of the teacher's pipeline that make the steps, in order."""
        return list(dict.fromkeys(segment.component for segment in self.segments))

    @property
    def networks(self) -> dict[str, Path]:
        """The folder of each of the teacher's networks, by its part of the pipeline."""
        names = (self.component, str(self.family.second_network))
        return dict(zip(names, self.family.teacher_folder().networks, strict=False))

    @property
    def takes_both(self) -> bool:
        """Whether the teacher is both networks of a pipeline that has two."""
        return self.family.teacher_folder().both

    @property
    def leaves_one(self) -> bool:
        """Whether the teacher is one network of a pipeline that has two."""
        folder = self.family.teacher_folder()
        return self.family.second_network is not None and not folder.both and has_second(folder.root)

    @property
    def component(self) -> str:
        """The network's part of the pipeline, which is also the prefix of its names in diffusers' LoRA files."""
        return self.family.denoiser.component

    @property
    def is_lora(self) -> bool:
        """Whether the experts are adapters."""
        return self.run.recipe.method.experts.kind == "lora"

    @property
    def shares_boundary(self) -> bool:
        """Whether the pipeline itself changes networks at a boundary: it takes two of them, and there are two."""
        return self.format == "diffusers" and len(self.segments) == 2 and self.family.second_network is not None

    @property
    def keeps_adapters(self) -> bool:
        """Whether the experts stay adapters, beside the teacher's own network, instead of being fused into it."""
        fused = self.format == "diffusers" and (len(self.segments) == 1 or self.shares_boundary)
        return self.is_lora and not fused

    @property
    def boundary_ratio(self) -> float | None:
        """A time between the last that the pipeline's first network sees and the first that its second does.

        A pipeline takes the first network at this time and above: so it is below the last time that the first visits,
        and above the first that the second does. None: the pipeline takes one network.
        """
        parts = [segment.component for segment in self.segments]
        if self.shares_boundary:
            second = 1
        elif self.keeps_adapters and len(self.components) == 2:
            second = parts.index(self.components[1])
        else:
            return None
        return (self.segments[second - 1].times[-1] + self.segments[second].times[0]) / 2

    @property
    def base(self) -> str:
        """The teacher's name: ``owner/name`` on the hub, else that of its folder, wherever it lies."""
        path = str(self.run.recipe.teacher.path)
        return parse_hub_name(path).name if path.startswith(HUB) else Path(path).resolve().name

    @property
    def adapter(self) -> Any:
        """Rank and alpha of the recipe's adapters."""
        return self.run.recipe.method.experts

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        """Each expert's weights by name, as `Experts.state` has them."""
        return [self.run.expert_state(phase.index) for phase in self.phases]

    def state_of(self, segment: Segment) -> dict[str, Tensor]:
        """Return the weights of a segment's network alone, by the names that `states` has."""
        state = self.states[segment.phase]
        return {name: value for name, value in state.items() if name.startswith(f"{segment.component}.")}

    def layers(self, segment: Segment) -> dict[str, tuple[Tensor, Tensor]]:
        """Return lora_A [r, in] and lora_B [out, r] by the layer's name in the network, without the part's."""
        found, state = {}, self.state_of(segment)
        for name, down in state.items():
            layer, part, _ = name.partition(".lora_A.")
            if part:
                found[layer.removeprefix(f"{segment.component}.")] = (down, state[f"{layer}.lora_B.weight"])
        return found


def make_plan(run: Run, format: str, dtype: str | None = None) -> Plan:
    """Check a run for an export; reads the experts and the teacher's configs, and writes nothing.

    Args:
        run: the run.
        format: one of `FORMATS`.
        dtype: of the exported weights; None: the teacher's own for networks, float32 for adapters.

    Raises:
        UserError: an unfinished run, a family that is not diffusers', experts that the format does not take, adapters
            that do nothing, or times that no scheduler of the pipeline visits.
    """
    import diffusers

    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format{nearest(format, FORMATS)}")
    family = run.family
    if not isinstance(family, PretrainedFamily):
        raise UserError(f"run '{run.folder}': family '{family.name}' is this package's own network, which diffusers "
                        f"does not have; `raydmd serve` and `raydmd generate` take the run")  # fmt: skip
    if not family.pipelines:
        raise UserError(f"run '{run.folder}': diffusers has no pipeline of family '{family.name}'; `raydmd serve` and "
                        f"`raydmd generate` take the run")  # fmt: skip
    _check_finished(run)
    experts = run.recipe.method.experts
    if format != "diffusers" and experts.kind != "lora":
        raise UserError(f"--format {format}: the run's experts are whole networks (method.experts.kind "
                        f"{experts.kind}); use --format diffusers")  # fmt: skip
    if run.recipe.method.solver != "euler":
        raise UserError(f"method.solver: {run.recipe.method.solver}: steps with fresh noise are not exported")
    if dtype is None:
        dtype = family.options["dtype"] if format == "diffusers" else "float32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: no such dtype{nearest(dtype, DTYPES)}")
    options = {**family.given, "dtype": dtype, "gradient_checkpointing": False}
    family = type(family)(family.path, options)
    if run.recipe.teacher.lora is not None:
        family.use_lora(run.recipe.teacher.lora)
    family.check_teacher()
    pipeline = family.pipelines[0]
    kind = getattr(diffusers, pipeline, None)
    if kind is None:
        raise UserError(f"family '{family.name}': the installed diffusers {diffusers.__version__} has no {pipeline}")
    times = trained_times(run.phases)
    sampler = choose_sampler(family.student_samplers(times), times, family)
    plan = Plan(run, family, format, dtype, pipeline, sampler)
    if run.recipe.teacher.lora is not None and plan.keeps_adapters:
        raise UserError(f"--format {format}: the experts are adapters of a teacher that teacher.lora was fused "
                        f"into; one expert, or two of Wan, are fused into it by --format diffusers")  # fmt: skip
    _check_experts(plan)
    return plan


def trained_times(phases: Sequence[Phase]) -> list[float]:
    """Return the times of all phases, falling from t_max to 0."""
    return [phases[0].times[0], *(t for phase in phases for t in phase.times[1:])]


def choose_sampler(samplers: Sequence[Sampler], times: Sequence[float], family: PretrainedFamily) -> Sampler:
    """Return the first sampler whose scheduler visits the trained times.

    Each is made and asked: what a scheduler's code does with a config differs from one to the next.

    Raises:
        UserError: none does.
    """
    for sampler in samplers:
        if visits(sampler, times, family):
            return sampler
    shown = ", ".join(f"{t:.4g}" for t in times[:-1])
    hint = family.sampler_hint
    raise UserError(f"method.times: no scheduler that {family.pipelines[0]} takes visits the trained times {shown}"
                    f"{hint and f': {hint}'}")  # fmt: skip


def _check_finished(run: Run) -> None:
    trained = run.trained_phases()
    if len(trained) < len(run.phases):
        raise UserError(f"run '{run.folder}' is not finished: it has {len(trained)} of {len(run.phases)} experts; "
                        f"train it to its end")  # fmt: skip
    if (index := read_index(run.folder)) is not None:
        for phase in run.phases:
            check_expert(run.folder, index, phase.index, content=True)


def _check_experts(plan: Plan) -> None:
    for phase, state in zip(plan.phases, plan.states, strict=True):
        file, own = plan.run.expert_file(phase.index), tuple(f"{part}." for part in plan.networks)
        if other := next((name for name in state if not name.startswith(own)), None):
            raise UserError(f"{file}: '{other}' is not of the pipeline's {' or '.join(plan.networks)}: it is of "
                            f"another teacher")  # fmt: skip
        segments = [segment for segment in plan.segments if segment.phase == phase.index]
        if lacking := next((each.component for each in segments if not plan.state_of(each)), None):
            raise UserError(f"{file}: it has no weights of the pipeline's {lacking}: it is of another teacher")
        if not plan.is_lora:
            continue
        layers = [plan.layers(segment) for segment in segments]
        if not any(bool(up.any()) for each in layers for _, up in each.values()):
            raise UserError(f"{file}: the adapters are empty (every lora_B is 0): the expert is the teacher itself")
        if plan.format == "lightning":
            for layer in layers[0]:
                plan.family.original_layer(layer)
