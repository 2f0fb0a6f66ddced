"""How a family's own diffusers pipeline samples a student: the scheduler of its times, and the pipeline's arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from raydmd.diffusion.times import shift_time, step_grid
from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.prompts_by_pipeline import NEGATIVE
from raydmd.models.diffusers.sampler_grid import EULER, TIMESTEPS, UNIPC

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
        shipped: another sampler, whose scheduler a folder has instead where ``sigmas`` are needed: it comes near
            without them.
    """

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] = ()
    shipped: "Sampler | None" = None


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

    def visited(shift: float) -> list[float]:
        last = shift_time(1.0 / TIMESTEPS, shift)
        return [shift_time(1.0 + (last - 1.0) * i / (count - 1), shift) for i in range(count)] + [0.0]

    low, high = 1e-3, 1e3  # the last time rises with the shift
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if visited(middle)[-2] < times[-2] else (low, middle)
    shift = round(low, 6)
    return shift if _same(visited(shift), times) else None


def unipc_config(times: Sequence[float]) -> dict[str, Any] | None:
    """Return a UniPCMultistepScheduler's config with which n steps visit falling times [1, ..., 0].

    It shifts times at x_i = .999 i / n from 1, and stretches them so that the last is ``shift_terminal``:
    1 - t_i = c x_i / (s - (s - 1) x_i). So 1 / (1 - t_i) is a line in 1 / x_i with slope s / c and intercept
    (1 - s) / c, from which s and c come. Its first order without the corrector is Euler's method; its timesteps are
    cut to whole numbers (and 1000 becomes 999), which no config changes. None where the times are not of this law.
    """
    count = len(times) - 1
    config = {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero", "solver_order": 1,
        "disable_corrector": list(range(count)),
    }  # fmt: skip
    if count == 1:
        return {**config, "flow_shift": 1.0}
    x = np.array([(1.0 - 1.0 / TIMESTEPS) * i / count for i in range(1, count)])
    y = 1.0 / (1.0 - np.array(times[1:-1]))
    slope, intercept = np.polyfit(1.0 / x, y, 1) if count > 2 else (y[0] * x[0], 0.0)
    if slope + intercept <= 0.0 or not np.allclose(slope / x + intercept, y, rtol=1e-6):
        return None
    return {**config, "flow_shift": float(slope / (slope + intercept)), "shift_terminal": float(times[-2])}


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    falling = all(a > b for a, b in pairwise(one))
    return falling and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= SAME


def wan_samplers(times: Sequence[float]) -> list[Sampler]:
    """Return samplers for a pipeline that gives its scheduler the number of steps alone, as Wan's does.

    FlowMatchEulerDiscreteScheduler where the times are its own, FlowMapEulerDiscreteScheduler where they are evenly
    spaced before a shift. Any other times are given to FlowMatchEulerDiscreteScheduler; in a folder UniPC stands for
    it, where it can be, whose noise levels are right and whose timesteps are cut.
    """
    call, found = {"num_inference_steps": len(times) - 1}, []
    if (shift := euler_shift(times)) is not None:
        found.append(Sampler(EULER, {"shift": shift}, call))
    if (shift := even_shift(times)) is not None:
        found.append(Sampler(FLOW_MAP, {"shift": shift}, call))
    config = unipc_config(times)
    near = None if config is None else Sampler(UNIPC, config, call)
    return [*found, Sampler(EULER, {"shift": 1.0}, call, tuple(times[:-1]), near)]
