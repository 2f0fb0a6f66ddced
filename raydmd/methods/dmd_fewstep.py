"""Few-step DMD: the whole rollout is differentiated (Phased DMD Eq. 10, Fig. 1a)."""

from raydmd.methods.distribution_matching import DistributionMatching


class FewStepDMD(DistributionMatching):
    """One phase that keeps the graph of all its steps."""

    name = "dmd-fewstep"
    gradient = "vanilla"
