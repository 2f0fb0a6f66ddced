"""What is exported of a run, and how plain diffusers samples it: all that can be wrong is found here first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydmd.diffusion.times import step_grid
from raydmd.errors import UserError, nearest
from raydmd.models.diffusers.hub import HUB, parse_hub_name
from raydmd.models.diffusers.pipeline_folder import DTYPES
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.student_sampler import SAME, Sampler
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

    @property
    def begins(self) -> dict[int, str]:
        """By the number of steps made, the name of the expert that is next; the first one's again after the last."""
        made, found = 0, {}
        for phase, name in zip(self.phases, [*self.names[1:], self.names[0]], strict=True):
            made += phase.steps
            found[made] = name
        return found

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
        return self.format == "diffusers" and len(self.phases) == 2 and self.family.second_network is not None

    @property
    def keeps_adapters(self) -> bool:
        """Whether the experts stay adapters, beside the teacher's own network, instead of being fused into it."""
        fused = self.format == "diffusers" and (len(self.phases) == 1 or self.shares_boundary)
        return self.is_lora and not fused

    @property
    def boundary_ratio(self) -> float:
        """A time between the last of the first expert's and the first of the second's, which a pipeline compares with.

        A pipeline takes the first network at this time and above: so it is below the last time that the first visits,
        and above the first that the second does.
        """
        last, first = self.phases[0].times[-2], self.phases[1].times[0]
        return (last + first) / 2

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

    def layers(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return lora_A [r, in] and lora_B [out, r] by the layer's name in the network, without the part's."""
        found = {}
        for name, down in state.items():
            layer, part, _ = name.partition(".lora_A.")
            if part:
                found[layer.removeprefix(f"{self.component}.")] = (down, state[f"{layer}.lora_B.weight"])
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
        if _visits(sampler, times, family):
            return sampler
    shown = ", ".join(f"{t:.4g}" for t in times[:-1])
    raise UserError(f"method.times: no scheduler that {family.pipelines[0]} takes visits the trained times {shown}")


def _visits(sampler: Sampler, times: Sequence[float], family: PretrainedFamily) -> bool:
    """Whether a scheduler's noise levels and timesteps are those of the trained times."""
    import diffusers

    kind, count = getattr(diffusers, sampler.scheduler, None), len(times) - 1
    if kind is None:
        return False  # of a newer diffusers
    scheduler, call = kind(**sampler.config), sampler.call
    if sampler.sigmas:
        scheduler.set_timesteps(count, sigmas=list(sampler.sigmas))
    elif given := {key: call[key] for key in ("sigmas", "timesteps") if key in call}:
        scheduler.set_timesteps(**given)
    elif family.gives_sigmas:
        scheduler.set_timesteps(sigmas=step_grid(count)[:-1])
    else:
        scheduler.set_timesteps(count)
    t = torch.tensor(times, dtype=torch.float64)
    wanted, found = family.noise_levels(t), scheduler.sigmas.to(torch.float64)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-5, atol=2 * SAME):
        return False
    apart = scheduler.timesteps.to(torch.float64) - family.network_timesteps(t[:-1])
    return bool(apart.abs().max() <= 1000 * SAME)


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
        file = plan.run.expert_file(phase.index)
        if other := next((name for name in state if not name.startswith(f"{plan.component}.")), None):
            raise UserError(f"{file}: '{other}' is not of the pipeline's {plan.component}: experts of another part, or "
                            f"of two, are not exported")  # fmt: skip
        if not plan.is_lora:
            continue
        layers = plan.layers(state)
        if not any(bool(up.any()) for _, up in layers.values()):
            raise UserError(f"{file}: the adapters are empty (every lora_B is 0): the expert is the teacher itself")
        if plan.format == "lightning":
            for layer in layers:
                plan.family.original_layer(layer)
