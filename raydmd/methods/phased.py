"""Phased DMD: K experts on K subintervals, SGTS inside each (Phased DMD Sec. 2.3, Fig. 1d)."""

from raydmd.methods.distribution_matching import DistributionMatching


class PhasedDMD(DistributionMatching):
    """As many phases as there are experts; each ends where the next one's noise begins."""

    name = "phased"
    experts = 2

    def check_counts(self, steps: int, count: int) -> None:
        """Allow any number of phases."""
        self.check_regression()
