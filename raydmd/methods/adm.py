"""ADM: adversarial distribution matching (DMDX Sec. 3.2), in phases too.

A step of the probability-flow ODE from the same x_t is made by the teacher and by the fake score; a discriminator tells
where it leads by which. Its verdict on the fake score's reaches the generator through that step.
"""

from typing import Any

from pydantic import Field

from raydmd.config.recipe import MethodOptions, NonNegative, Positive, Section, in_miniature
from raydmd.errors import UserError
from raydmd.methods.base import TEACHER, Program, Trained
from raydmd.methods.phased import PhasedDMD
from raydmd.models.base import Family
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations
from raydmd.training.backpropagated import BackpropagatedGenerator
from raydmd.training.discriminator import Discriminator, DiscriminatorOptions, check_blocks
from raydmd.training.fake_score import Fake
from raydmd.training.pair_distance import check_distance


class ADMSection(Section):
    """ADM's own."""

    dt: float = Field(1 / 64, gt=0, lt=1, description="length of an ODE step, as a share of the noisiest time")
    steps: Positive = Field(1, description="such steps before the discriminator looks")
    discriminator_updates: Positive = Field(
        1, description="discriminator updates to one of the generator, on the same steps: its time scale"
    )
    warmup: NonNegative = Field(
        0,
        description="generator updates by regression on ODE pairs before the first by ADM",
        json_schema_extra=in_miniature(1),
    )


class ADMOptions(MethodOptions):
    """The common options, ADM's and its discriminator's."""

    adm: ADMSection = ADMSection()
    discriminator: DiscriminatorOptions = DiscriminatorOptions()


class ADM(PhasedDMD):
    """The generator's gradient comes from the discriminator, through the fake score's step."""

    name, options_type, experts = "adm", ADMOptions, 1
    roles = {
        "generator": Trained(BackpropagatedGenerator), "fake": Trained(Fake), "discriminator": Trained(Discriminator),
        "teacher": TEACHER,
    }  # fmt: skip
    options: ADMOptions

    def iteration(self, run: Program, n: int, rollouts: list[Any]) -> None:
        """Train the fake score, the discriminator on the steps from the proposal, the generator on its verdict."""
        own, prompts = self.options.adm, run.prompts(n, self.options.fake_updates)
        for samples in rollouts:
            run.fake.update(samples)
        if n < own.warmup:
            run.generator.update(run.generator.regress(n, prompts))
            return
        step = own.dt * run.phase(n).t_max, own.steps
        proposal = run.generator.propose(n, prompts)
        generated = run.fake.step(*step, proposal)
        real = run.teacher.step(*step, proposal)
        for _ in range(own.discriminator_updates):
            run.discriminator.update(real, generated)
        verdict = run.discriminator.vjp(generated)
        run.generator.update(run.fake.step_vjp(*step, proposal, verdict))

    @property
    def pairs(self) -> int:
        """The teacher's ODE pairs of the warm-up."""
        return self.options.regression.pairs if self.options.adm.warmup else 0

    def check(self, family: Family, hub: bool = True) -> list[str]:
        """Have the discriminator's blocks, and what measures the distance of the warm-up's regression."""
        check_blocks(self.recipe, family)
        return check_distance(self.recipe, family, hub) if self.options.adm.warmup else []

    def phases(self, t_max: float) -> list[Phase]:
        """Have every step end above the phase's end."""
        phases, own = super().phases(t_max), self.options.adm
        if self.options.score_margin < own.dt * own.steps:
            raise UserError(
                f"method.score_margin: {self.options.score_margin} is less than method.adm's steps of {own.dt:g} x "
                f"{own.steps} go down"
            )
        if own.warmup:
            self.check_one_phase("method.adm.warmup", len(phases))
            if own.warmup >= (total := sum(plan_iterations(self.recipe, phases))):
                raise UserError(f"method.adm.warmup: {own.warmup} of {total} iterations leave ADM none")
        return phases

    def check_one_phase(self, key: str, count: int) -> None:
        """Refuse ODE pairs, which end at the data, where a first phase does not."""
        if count > 1:
            raise UserError(f"{key}: training on ODE pairs goes with 1 phase, not {count}")
