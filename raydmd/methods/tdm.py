"""TDM: one few-step student whose latents are matched to the teacher's at every step of its grid (TDM Sec. 4)."""

from typing import Literal

from raydmd.config.recipe import MethodOptions
from raydmd.methods.base import TEACHER, Trained
from raydmd.methods.distribution_matching import DistributionMatching
from raydmd.training.trajectory import TrajectoryFake, TrajectoryGenerator


class TDMOptions(MethodOptions):
    """TDM's own choices; ``fake_target: subinterval`` is the unbiased one."""

    score_interval: Literal["nested", "disjoint", "fixed"] = "disjoint"
    fake_target: Literal["subinterval", "naive"] = "naive"


class TDM(DistributionMatching):
    """One phase; each draw ends at a step of its own, and its scores see that step's interval."""

    name, options_type = "tdm", TDMOptions
    roles = {"generator": Trained(TrajectoryGenerator), "fake": Trained(TrajectoryFake), "teacher": TEACHER}
