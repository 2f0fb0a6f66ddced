"""Few-step DMD with stochastic gradient truncation: a random exit step, one call's graph (Phased DMD Sec. 2.2)."""

from raydmd.methods.distribution_matching import DistributionMatching


class TruncatedDMD(DistributionMatching):
    """One phase whose rollouts leave at a random step, straight to t = 0."""

    name = "dmd-sgts"
