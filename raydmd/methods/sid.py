"""SiD: the Fisher divergence between the generated and the teacher's distribution, in phases too (SiD Sec. 3)."""

from typing import Any

from pydantic import Field

from raydmd.config.recipe import MethodOptions, Section
from raydmd.methods.base import TEACHER, Program, Trained
from raydmd.methods.phased import PhasedDMD
from raydmd.training.backpropagated import FisherGenerator
from raydmd.training.fake_score import Fake


class SiDSection(Section):
    """SiD's own."""

    alpha: float = Field(1.0, ge=0, description="how much of the biased form of the divergence is taken off; 1 to 1.2")


class SiDOptions(MethodOptions):
    """The common options, and SiD's."""

    sid: SiDSection = SiDSection()


class SiD(PhasedDMD):
    """The loss is differentiated by both predictions, and each network takes its derivative back to x_t."""

    name, options_type, experts = "sid", SiDOptions, 1
    roles = {"generator": Trained(FisherGenerator), "fake": Trained(Fake), "teacher": TEACHER}
    options: SiDOptions

    def iteration(self, run: Program, n: int, rollouts: list[Any]) -> None:
        """Train the fake score on the rollouts, then the generator on what both networks give back."""
        for samples in rollouts:
            run.fake.update(samples)
        proposal = run.generator.propose(n, run.prompts(n, self.options.fake_updates))
        own = run.generator.cotangents(self.options.sid.alpha, run.teacher.score(proposal), run.fake.score(proposal))
        run.generator.update(own, run.teacher.vjp(proposal, own), run.fake.vjp(proposal, own))
