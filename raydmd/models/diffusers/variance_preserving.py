"""Families whose network counts the steps of a discrete variance-preserving process (Stable Diffusion, CogVideoX)."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from raydmd.diffusion.schedule import Prediction, VariancePreserving
from raydmd.errors import UserError, nearest
from raydmd.models.diffusers.discrete_grid import SPACINGS, DiscreteGrid, discrete_grid
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.sampler_grid import SCHEDULER_FILE
from raydmd.models.diffusers.student_sampler import Sampler

PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""Of a scheduler's config, what says the process and the prediction."""
OTHERS = (
    "DEISMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers of the same process whose times are not followed."""
PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class VariancePreservingFamily(PretrainedFamily):
    """A family whose process and prediction its scheduler_config.json says; ``process`` where there is none."""

    process: ClassVar[Mapping[str, Any]]  # as a scheduler_config.json

    @property
    def _process(self) -> Mapping[str, Any]:
        config = self.scheduler_config
        return self.process if config is None else config

    @cached_property
    def schedule(self) -> VariancePreserving:  # type: ignore[override]
        """The process of the scheduler's betas.

        Raises:
            UserError: the scheduler is of another process, or its betas are of a law that is not known here.
        """
        kind = self._process.get("_class_name")
        flow = any(self._process.get(key) for key in ("use_flow_sigmas", "use_dynamic_shifting"))
        continuous = self._process.get("timestep_type", "discrete") != "discrete"
        if kind not in (*SPACINGS, *OTHERS) or flow or continuous:
            of = "of flow sigmas" if flow else "of timestep_type continuous" if continuous else f"a {kind}"
            raise UserError(f"teacher.path: {SCHEDULER_FILE} is {of}; family '{self.name}' takes one of a discrete "
                            f"variance-preserving process ({', '.join(SPACINGS)})")  # fmt: skip
        try:
            return VariancePreserving.from_diffusers(self._process)
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"teacher.path: {SCHEDULER_FILE}: {error}") from None

    @cached_property
    def prediction(self) -> Prediction:  # type: ignore[override]
        """What the network predicts, by ``prediction_type``.

        Raises:
            UserError: something that is not known here, or eps of a process that ends in noise alone.
        """
        kind = self._process.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise UserError(f"teacher.path: {SCHEDULER_FILE}: no prediction_type '{kind}'{nearest(kind, PREDICTIONS)}")
        if kind == "epsilon" and not float(self.schedule.alpha(self.schedule.t_max)):
            raise UserError(f"teacher.path: {SCHEDULER_FILE}: prediction_type epsilon does not go with "
                            f"rescale_betas_zero_snr: where only noise is left, eps does not tell x_0")  # fmt: skip
        return PREDICTIONS[kind]

    def _read_grid(self, config: Mapping[str, Any]) -> DiscreteGrid:
        """Read the law of the timesteps."""
        return discrete_grid(config, self.schedule)

    def student_samplers(self, times: Sequence[float]) -> list[Sampler]:
        """Return Euler's method on the process, by a pipeline that takes ``timesteps``.

        Its steps in x / alpha are the student's. Spacing ``leading`` is what has it begin at normal numbers
        (``init_noise_sigma``); the timesteps themselves are given.
        """
        config = {key: self._process[key] for key in PROCESS if key in self._process}
        timesteps = [round(float(self.schedule.timestep_of(t)), 6) for t in times[:-1]]
        call = {"num_inference_steps": len(timesteps), "timesteps": timesteps}
        return [Sampler("EulerDiscreteScheduler", {**config, "timestep_spacing": "leading", "steps_offset": 1}, call)]

    def noise_levels(self, times: Tensor) -> Tensor:
        """Return sigma / alpha at times [N]."""
        return self.schedule.sigma(times) / self.schedule.alpha(times)

    def network_timesteps(self, times: Tensor) -> Tensor:
        """Return the timesteps of the discrete process."""
        return self.schedule.timestep_of(times)
