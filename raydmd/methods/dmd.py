"""DMD: one network call from noise to data (DMD Sec. 3), with or without regression on ODE pairs."""

from dataclasses import replace

from pydantic import Field

from raydmd.config.recipe import MethodOptions, Section, Share
from raydmd.errors import UserError
from raydmd.methods.base import TEACHER, Trained
from raydmd.methods.distribution_matching import DistributionMatching
from raydmd.models.base import Family
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import check_intervals
from raydmd.training.fake_score import Fake
from raydmd.training.one_step import OneStepGenerator
from raydmd.training.pair_distance import check_distance


class DMDSection(Section):
    """DMD's own; `method.score_margin` is its T_min."""

    t_max: Share = Field(1.0, description="the scores' highest t, as a share of the noisiest; DMD's T_max is .98")
    reference_samples: bool = Field(
        False, description="match distributions on the samples from the pairs' noise, too (Algorithm 1, LAION)"
    )
    real_score_only: bool = Field(False, description="follow the teacher's score alone, without the fake's (Fig. 3a)")


class DMDOptions(MethodOptions):
    """The common options, and DMD's."""

    dmd: DMDSection = DMDSection()


class DMD(DistributionMatching):
    """One phase of one step."""

    name, options_type = "dmd", DMDOptions
    roles = {"generator": Trained(OneStepGenerator), "fake": Trained(Fake), "teacher": TEACHER}
    steps = 1
    gradient = "vanilla"
    options: DMDOptions

    @property
    def pairs(self) -> int:
        """The teacher's ODE pairs of the regression (DMD Eq. 9)."""
        regression = self.options.regression
        return regression.pairs if regression.weight or self.options.dmd.reference_samples else 0

    def phases(self, t_max: float) -> list[Phase]:
        """Cut the scores' interval at T_max."""
        highest = self.options.dmd.t_max * t_max
        phases = [
            phase if phase.score_low == phase.score_high else replace(phase, score_high=min(phase.score_high, highest))
            for phase in super().phases(t_max)
        ]
        check_intervals(self.recipe, phases)
        return phases

    def check(self, family: Family, hub: bool = True) -> list[str]:
        """Have what measures the regression's distance."""
        return check_distance(self.recipe, family, hub) if self.pairs else []

    def check_counts(self, steps: int, count: int) -> None:
        """Refuse more than the one step."""
        if steps != 1:
            raise UserError(f"method.steps: dmd has 1 step, not {steps}; for more, method.name: dmd-fewstep")
        super().check_counts(steps, count)

    def check_regression(self) -> None:
        """Allow it."""
