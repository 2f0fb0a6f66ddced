"""Families whose network counts the steps of a discrete variance-preserving process (Stable Diffusion, CogVideoX)."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from raydmd.diffusion.schedule import Prediction, VariancePreserving
from raydmd.errors import UserError, nearest
from raydmd.models.diffusers.discrete_grid import DiscreteGrid, discrete_grid
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.sampler_grid import SCHEDULER_FILE

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
            UserError: the betas are of a law that is not known here, or of no process.
        """
        try:
            return VariancePreserving.from_diffusers(self._process)
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"teacher.path: {SCHEDULER_FILE}: {error}") from None

    @cached_property
    def prediction(self) -> Prediction:  # type: ignore[override]
        """What the network predicts, by ``prediction_type``.

        Raises:
            UserError: something that is not known here.
        """
        kind = self._process.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise UserError(f"teacher.path: {SCHEDULER_FILE}: no prediction_type '{kind}'{nearest(kind, PREDICTIONS)}")
        return PREDICTIONS[kind]

    def _read_grid(self, config: Mapping[str, Any]) -> DiscreteGrid:
        """Read the law of the timesteps."""
        return discrete_grid(config, self.schedule)
