"""The times that a pretrained teacher's own sampler visits, from its scheduler_config.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raydmd.diffusion.times import shift_time
from raydmd.errors import UserError

SCHEDULER_FILE = "scheduler/scheduler_config.json"
TIMESTEPS = 1000
"""Steps of the schedule that the networks' time counts; ``num_train_timesteps``."""
EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
OTHER_LAWS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas")

MuLaw = Callable[[int, int], float]
"""The shift's logarithm (or the shift, of a linear law), of a sample's tokens and the number of steps."""

Spacing = Literal["steps", "to_shifted_minimum", "to_minimum", "onto_minimum"]
"""How the times lie before the shift, for n steps of a schedule of 1000:

- ``steps``: evenly from 1 to 1/n (a pipeline that gives its scheduler the sigmas, as QwenImagePipeline);
- ``to_shifted_minimum``: evenly from 1 to the shifted 1/1000, n of them (FlowMatchEulerDiscreteScheduler alone);
- ``to_minimum``: the first n of n + 1 evenly from 1 to 1/1000 (UniPCMultistepScheduler with flow sigmas);
- ``onto_minimum``: evenly from 1 to 1/1000, n of them (FlowMatchEulerDiscreteScheduler given mu, and no sigmas).
"""


@dataclass(frozen=True)
class SamplerGrid:
    """The law of a sampler's times for rectified flow: evenly spaced, shifted toward noise, perhaps stretched.

    Attributes:
        spacing: before the shift.
        shift: a fixed shift; None where it depends on the number of tokens.
        line: (base_image_seq_len, max_image_seq_len, base_shift, max_shift): mu rises linearly with the tokens.
        exponential: whether the shift is exp(mu), else mu.
        terminal: the last time above 0, to which the others are stretched; None: they are left alone.
        mu: of tokens and steps; None: it is the line's.
    """

    spacing: Spacing
    shift: float | None
    line: tuple[float, float, float, float] = (256.0, 4096.0, 0.5, 1.15)
    exponential: bool = True
    terminal: float | None = None
    mu: MuLaw | None = None

    def shift_at(self, tokens: int, steps: int) -> float:
        """Return the shift for a sample of ``tokens`` tokens, as `calculate_shift` of diffusers' pipelines."""
        if self.shift is not None:
            return self.shift
        few, many, low, high = self.line
        mu = self.mu(tokens, steps) if self.mu else low + (tokens - few) * (high - low) / (many - few)
        return math.exp(mu) if self.exponential else mu

    def times(self, steps: int, tokens: int) -> list[float]:
        """Return the ``steps`` + 1 falling times [1, ..., 0] for a sample of ``tokens`` tokens.

        They are the ``sigmas`` of diffusers' scheduler, but for UniPC's first, which is 1e-6 below 1 there.

        Raises:
            UserError: fewer than 1 step, or a shift that is not positive for so many tokens.
        """
        if steps < 1:
            raise UserError(f"steps: {steps} is not possible, use 1 or more")
        shift = self.shift_at(tokens, steps)
        if not (math.isfinite(shift) and shift > 0.0):
            raise UserError(f"teacher.path: {SCHEDULER_FILE}: the shift is {shift:g} for {tokens} tokens; {REMEDY}")
        minimum = 1.0 / TIMESTEPS
        if self.spacing == "to_minimum":
            even = [1.0 + (minimum - 1.0) * i / steps for i in range(steps)]
        else:
            lasts = {"steps": 1.0 / steps, "to_shifted_minimum": shift_time(minimum, shift), "onto_minimum": minimum}
            last = lasts[self.spacing]
            even = [1.0 + (last - 1.0) * i / max(steps - 1, 1) for i in range(steps)]
        times = [shift_time(t, shift) for t in even]
        if self.terminal is not None and times[-1] < 1.0:
            scale = (1.0 - times[-1]) / (1.0 - self.terminal)
            times = [1.0 - (1.0 - t) / scale for t in times]
        return [*times, 0.0]


REMEDY = "teacher.timestep_shift=NUMBER sets a fixed shift instead"


def sampler_grid(
    config: Mapping[str, Any], *, sigmas_given: bool, mu_given: bool = False, mu: MuLaw | None = None
) -> SamplerGrid:
    """Return the law of a scheduler's times.

    Args:
        config: its scheduler_config.json.
        sigmas_given: whether the family's pipeline gives the scheduler evenly spaced sigmas, and mu by the number of
            tokens; else it gives the number of steps alone.
        mu_given: whether it gives mu without sigmas, too.
        mu: of tokens and steps, where the pipeline's own law is not the line of the scheduler's config.

    Raises:
        UserError: a scheduler or a setting that is not followed here, by name.
    """
    kind = config.get("_class_name")
    if kind not in (EULER, UNIPC):
        raise unknown(f"_class_name '{kind}' (known: {EULER}, {UNIPC})")
    for key in OTHER_LAWS:
        if config.get(key):
            raise unknown(f"{key} {config[key]}")
    if config.get("num_train_timesteps", TIMESTEPS) != TIMESTEPS:
        raise unknown(f"num_train_timesteps {config['num_train_timesteps']} (known: {TIMESTEPS})")
    if kind == UNIPC:
        for key, wanted, default in (("use_flow_sigmas", True, False), ("final_sigmas_type", "zero", "zero"),
                                     ("prediction_type", "flow_prediction", "epsilon")):  # fmt: skip
            if config.get(key, default) != wanted:
                raise unknown(f"{key} {config.get(key, default)} (known: {wanted})")
    terminal = _number(config, "shift_terminal", 0.0) or None
    if terminal is not None and not 0.0 < terminal < 1.0:
        raise unknown(f"shift_terminal {terminal:g} (known: between 0 and 1)")
    spacing: Spacing = "steps" if sigmas_given else "to_minimum" if kind == UNIPC else "to_shifted_minimum"
    if not config.get("use_dynamic_shifting"):
        key = "flow_shift" if kind == UNIPC else "shift"
        shift = _number(config, key, 1.0)
        if shift <= 0.0:
            raise unknown(f"{key} {shift:g} (known: above 0)")
        return SamplerGrid(spacing, shift, terminal=terminal)
    if not sigmas_given and not mu_given:
        raise unknown("use_dynamic_shifting true: this family's pipeline gives its scheduler no mu")
    if not sigmas_given and kind == UNIPC:
        raise unknown(f"use_dynamic_shifting true: this family's pipeline gives {UNIPC} no sigmas")
    spacing = "steps" if sigmas_given else "onto_minimum"
    if (law := config.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
        raise unknown(f"time_shift_type '{law}' (known: exponential, linear)")
    few, many = _number(config, "base_image_seq_len", 256), _number(config, "max_image_seq_len", 4096)
    if few == many:
        raise unknown(f"base_image_seq_len and max_image_seq_len are both {few:g}")
    line = few, many, _number(config, "base_shift", 0.5), _number(config, "max_shift", 1.15)
    return SamplerGrid(spacing, None, line, law == "exponential", terminal, mu)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise unknown(f"{key} {value!r} (a number is needed)")
    return float(value)


def unknown(what: str) -> UserError:
    """Return the error of a sampler that is not followed, for whoever reads its config."""
    return UserError(f"teacher.path: {SCHEDULER_FILE}: the teacher's sampler cannot be followed: {what}; {REMEDY}")
