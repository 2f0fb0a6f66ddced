"""How a family's own diffusers pipeline samples a student: the scheduler of its times, and the pipeline's arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from raydmd.diffusion.times import shift_time, step_grid
from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.prompts_by_pipeline import NEGATIVE
from raydmd.models.diffusers.sampler_grid import EULER, TIMESTEPS

FLOW_MAP = (
    "FlowMapEulerDiscreteScheduler"  # Euler's steps at n shifted times, evenly from 1 to 1/n; newer diffusers have it
)
SAME = 1e-6  # times that differ by less are one

Inputs = Mapping[str, Tensor | list[Tensor]]
"""Arguments of a pipeline's call that stand for prompts; a list has a tensor a sample."""


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler and the arguments with which a pipeline is called, so that it makes a student's steps.

    Attributes:
        scheduler: its class.
        config: of it; what is not there is the class's default.
        call: the pipeline's arguments, as ``num_inference_steps`` and ``sigmas``.
        sigmas: given to the scheduler itself, where the pipeline takes none; empty: the scheduler has its own.
    """

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] = ()


class SampledByDiffusers:
    """What `raydmd export` asks of a family; a family of another pipeline says here what it has otherwise.

    Attributes:
        unguided: arguments of the pipeline with which the network's prediction is used as it is.
        second_network: the pipeline's part that takes over below its config's ``boundary_ratio``; None: it has none.
        sampler_hint: what times the pipeline's schedulers visit, for whoever asked for others.
    """

    denoiser: ClassVar[type[PretrainedDenoiser]]
    gives_sigmas: ClassVar[bool]
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    second_network: ClassVar[str | None] = None
    sampler_hint: ClassVar[str] = ""

    def student_samplers(self, times: Sequence[float]) -> list[Sampler]:
        """Return samplers of a student's falling times [t_max, ..., 0], the best first; which of them do, is tried.

        By default rectified flow, by a pipeline that takes ``sigmas``.
        """
        count, shift = len(times) - 1, even_shift(times)
        if shift is None:
            return [Sampler(EULER, {"shift": 1.0}, {"num_inference_steps": count, "sigmas": list(times[:-1])})]
        even = {} if self.gives_sigmas else {"sigmas": step_grid(count)[:-1]}
        return [Sampler(EULER, {"shift": shift}, {"num_inference_steps": count, **even})]

    def noise_levels(self, times: Tensor) -> Tensor:
        """Return the ``sigmas`` of a diffusers scheduler at times [N + 1]; by default rectified flow's, the times."""
        return times

    def network_timesteps(self, times: Tensor) -> Tensor:
        """Return the ``timesteps`` of a diffusers scheduler at times [N]."""
        return TIMESTEPS * times

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Return latents [B, *latent_shape] as the pipeline takes them."""
        return latents

    def stepped_latents(self, latents: Tensor) -> Tensor:
        """Return latents [B, *latent_shape] as the pipeline has them after a step; by default as it takes them."""
        return self.pipeline_latents(latents)

    def pipeline_inputs(self, conditions: Conditions) -> tuple[Conditions, Inputs]:
        """Return conditions of some samples, and the arguments with which the pipeline samples the same, unguided.

        By default the conditions as they are, and all of them but the null prompt's.

        Raises:
            UserError: they cannot be made.
        """
        return conditions, {name: value for name, value in conditions.items() if not name.startswith(NEGATIVE)}

    def original_layer(self, layer: str) -> str:
        """Return a layer's name as the model's own code has it, which ComfyUI and the Lightning releases use.

        Raises:
            UserError: it is not known.
        """
        raise UserError("--format lightning: the names of this family's layers outside diffusers are not known; use "
                        "--format lora")  # fmt: skip


def even_shift(times: Sequence[float]) -> float | None:
    """Return the shift of falling times [1, ..., 0] that are evenly spaced before it; None where they are not."""
    count = len(times) - 1
    if count == 1:
        return 1.0 if times[0] == 1.0 else None
    u, t = 1.0 - 1.0 / count, times[1]
    if not 0.0 < t < 1.0:
        return None
    shift = round(t * (1.0 - u) / (u * (1.0 - t)), 9)
    return shift if _same(step_grid(count, shift), times) else None


def euler_shift(times: Sequence[float]) -> float | None:
    """Return the shift with which FlowMatchEulerDiscreteScheduler visits falling times [1, ..., 0] by itself.

    It shifts times that lie evenly from 1 to the shifted 1/1000. None where no shift gives them.
    """
    count = len(times) - 1
    if count == 1:
        return 1.0 if times[0] == 1.0 else None

    low, high = 1e-3, 1e3  # the last time rises with the shift
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _euler_times(middle, count)[-2] < times[-2] else (low, middle)
    shift = round(low, 6)
    return shift if _same(_euler_times(shift, count), times) else None


def euler_stretch(times: Sequence[float]) -> dict[str, float] | None:
    """Return the config with which FlowMatchEulerDiscreteScheduler visits falling times [1, ..., 0], stretched.

    Its own times for a ``shift`` are stretched from 1, so that the last is ``shift_terminal``. Times of two or three
    steps are all of this law. None where no shift gives them.
    """
    count, last = len(times) - 1, times[-2]
    if count == 1 or times[0] != 1.0:
        return None

    def visited(shift: float) -> list[float]:
        own = _euler_times(shift, count)
        scale = (1.0 - last) / (1.0 - own[-2])
        return [*(1.0 - (1.0 - t) * scale for t in own[:-1]), 0.0]

    if count == 2:
        return {"shift": 1.0, "shift_terminal": last}
    low, high = 1e-3, 1e3  # the second time rises with the shift
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if visited(middle)[1] < times[1] else (low, middle)
    return {"shift": low, "shift_terminal": last} if _same(visited(low), times) else None


def _euler_times(shift: float, count: int) -> list[float]:
    """Return the times of ``count`` steps, 2 or more, that FlowMatchEulerDiscreteScheduler has for a shift."""
    last = shift_time(1.0 / TIMESTEPS, shift)
    return [shift_time(1.0 + (last - 1.0) * i / (count - 1), shift) for i in range(count)] + [0.0]


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    falling = all(a > b for a, b in pairwise(one))
    return falling and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= SAME


def wan_samplers(times: Sequence[float]) -> list[Sampler]:
    """Return samplers for a pipeline that gives its scheduler the number of steps alone, as Wan's does.

    FlowMatchEulerDiscreteScheduler where the times are its own, FlowMapEulerDiscreteScheduler where they are evenly
    spaced before a shift, the first again where its own can be stretched to them. Any other times are given to it.
    """
    call, found = {"num_inference_steps": len(times) - 1}, []
    if (shift := euler_shift(times)) is not None:
        found.append(Sampler(EULER, {"shift": shift}, call))
    if (shift := even_shift(times)) is not None:
        found.append(Sampler(FLOW_MAP, {"shift": shift}, call))
    if (stretched := euler_stretch(times)) is not None:
        found.append(Sampler(EULER, stretched, call))
    return [*found, Sampler(EULER, {"shift": 1.0}, call, tuple(times[:-1]))]
