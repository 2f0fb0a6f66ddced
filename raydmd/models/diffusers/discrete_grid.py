"""The times that the teacher's own sampler visits, where its network counts the steps of a discrete process."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydmd.diffusion.schedule import VariancePreserving
from raydmd.errors import UserError
from raydmd.models.diffusers.sampler_grid import OTHER_LAWS, unknown

SPACINGS: Mapping[str, str] = {  # schedulers that are followed, and their timestep_spacing where the config is silent
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "PNDMScheduler": "leading",
    "EulerDiscreteScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "CogVideoXDDIMScheduler": "leading",
    "CogVideoXDPMScheduler": "leading",
}
DPM = "DPMSolverMultistepScheduler"
KNOWN = ("leading", "linspace", "trailing")
NEVER_CLIP = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # whatever their clip_sample says
CLIPS = ("DDIMScheduler", "DDPMScheduler")  # which clip the predicted x_0 where clip_sample is not there


@dataclass(frozen=True)
class DiscreteGrid:
    """The law of a sampler's timesteps, of T that its network counts.

    Of a stochastic or multistep sampler the times are followed, by deterministic steps of one call, each to the next
    timestep and the last to clean data. (DDIM's, DDPM's and PNDM's steps in diffusers are T // n long whatever the
    spacing, so that with ``linspace`` they do not meet the next timestep; and with ``set_alpha_to_one: false`` the
    last ends where timestep 0 is, whose noise is left in the sample.)

    Attributes:
        schedule: the process.
        spacing: ``leading``: multiples of T // n; ``trailing``: from T - 1 on, T / n apart; ``linspace``: evenly from
            T - 1 to 0.
        offset: added to leading timesteps.
        one_more: whether the law is that of n + 1 timesteps, of which the last is left out (leading and linspace).
        whole: whether timesteps are rounded.
    """

    schedule: VariancePreserving
    spacing: str
    offset: int = 0
    one_more: bool = False
    whole: bool = True

    def timesteps(self, steps: int) -> list[float]:
        """Return ``steps`` falling timesteps in 0..T - 1.

        Raises:
            UserError: fewer than 1 step, more than the process has, or the offset leads beyond it.
        """
        total, count = self.schedule.steps, steps + self.one_more
        if not 1 <= steps <= count <= total:
            raise UserError(f"steps: {steps} is not possible, use 1 to {total - self.one_more}")
        if self.spacing == "trailing":
            found = np.round(np.arange(total, 0, -total / steps)) - 1
        elif self.spacing == "leading":
            found = np.arange(count)[::-1] * (total // count) + float(self.offset)
        else:
            found = np.linspace(0, total - 1, count)[::-1]
        chosen = (np.round(found) if self.whole else found)[:steps]
        if chosen[0] > total - 1:
            raise UserError(f"steps: {steps} is not possible: with steps_offset {self.offset} the first timestep would "
                            f"be {chosen[0]:g}, and the last of the process is {total - 1}")  # fmt: skip
        return [float(timestep) for timestep in chosen]

    def times(self, steps: int, tokens: int) -> list[float]:
        """Return the ``steps`` + 1 falling times, the last 0; they do not depend on ``tokens``.

        Raises:
            UserError: fewer than 1 step, or more than the process has.
        """
        return [*(float(self.schedule.time_of(timestep)) for timestep in self.timesteps(steps)), 0.0]


def discrete_grid(config: Mapping[str, Any], schedule: VariancePreserving) -> DiscreteGrid:
    """Return the law of a scheduler's timesteps.

    Args:
        config: its scheduler_config.json.
        schedule: the process that it describes.

    Raises:
        UserError: a scheduler or a setting that is not followed here, by name.
    """
    kind = str(config.get("_class_name"))
    if kind not in SPACINGS:
        raise unknown(f"_class_name '{kind}' (known: {', '.join(SPACINGS)})")
    for key in (*OTHER_LAWS, "use_flow_sigmas", "thresholding"):
        if config.get(key):
            raise unknown(f"{key} {config[key]}")
    if kind not in NEVER_CLIP and config.get("clip_sample", kind in CLIPS):
        raise unknown("clip_sample true (known: false)")
    if (last := config.get("final_sigmas_type") or "zero") != "zero":
        raise unknown(f"final_sigmas_type {last} (known: zero)")
    if kind == "PNDMScheduler" and not config.get("skip_prk_steps"):
        raise unknown("skip_prk_steps false (known: true)")
    if (interpolation := config.get("interpolation_type") or "linear") != "linear":
        raise unknown(f"interpolation_type '{interpolation}' (known: linear)")
    if kind == DPM and math.isfinite(least := float(config.get("lambda_min_clipped", -math.inf))):
        raise unknown(f"lambda_min_clipped {least:g} (known: none)")
    spacing = config.get("timestep_spacing") or SPACINGS[kind]
    if spacing not in KNOWN:
        raise unknown(f"timestep_spacing '{spacing}' (known: {', '.join(KNOWN)})")
    offset = config.get("steps_offset") or 0
    if type(offset) is not int or offset < 0:
        raise unknown(f"steps_offset {offset!r} (a whole number is needed)")
    whole = not (kind.startswith("Euler") and spacing == "linspace")
    return DiscreteGrid(schedule, spacing, offset, one_more=kind == DPM and spacing != "trailing", whole=whole)
