"""DMD: one network call from noise to data (DMD Sec. 3), with or without regression on ODE pairs."""

from raydmd.errors import UserError
from raydmd.methods.distribution_matching import DistributionMatching


class DMD(DistributionMatching):
    """One phase of one step."""

    name = "dmd"
    steps = 1
    gradient = "vanilla"

    @property
    def pairs(self) -> int:
        """The teacher's ODE pairs of the regression (DMD Eq. 9)."""
        regression = self.options.regression
        return regression.pairs if regression.weight else 0

    def check_counts(self, steps: int, count: int) -> None:
        """Refuse more than the one step."""
        if steps != 1:
            raise UserError(f"method.steps: dmd has 1 step, not {steps}; for more, method.name: dmd-fewstep")
        super().check_counts(steps, count)

    def check_regression(self) -> None:
        """Allow it."""
