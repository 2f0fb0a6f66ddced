"""A method of one's own: phased DMD whose generator follows the mean of two fake scores.

raydmd distill ring --plugin examples/two_fakes.py --set method.name=two-fakes --set method.two_fakes.weight=0.3
"""

from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from raydmd.config.recipe import MethodOptions, Section
from raydmd.diffusion.random import Key
from raydmd.methods.base import Trained
from raydmd.methods.phased import PhasedDMD
from raydmd.methods.registry import register_method
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import Noised, Score


class TwoFakesOptions(Section):
    weight: float = Field(0.5, ge=0, le=1, description="share of the second fake score in the mean")


class Options(MethodOptions):
    two_fakes: TwoFakesOptions = TwoFakesOptions()


class SecondFake(Fake):
    """Trained on the same samples, with an optimizer, random numbers and a figure of its own."""

    role, figures = "second", ("loss_second",)

    def _key(self, stream: str, draw: int) -> Key:
        return super()._key(f"second-{stream}", draw)


class MeanGenerator(Generator):
    def objective(self, x_s: Tensor, proposal: Noised, *scores: Score) -> tuple[Tensor, dict[str, int]]:
        teacher, first, second = scores
        weight = self.recipe.method.two_fakes.weight  # type: ignore[attr-defined]
        mean = replace(first, prediction=first.prediction.lerp(second.prediction, weight))
        return super().objective(x_s, proposal, teacher, mean)


@register_method
class TwoFakes(PhasedDMD):
    name, options_type = "two-fakes", Options
    roles = {**PhasedDMD.roles, "generator": Trained(MeanGenerator), "second": Trained(SecondFake)}

    def iteration(self, run: Any, n: int, rollouts: list[Any]) -> None:
        for samples in rollouts:
            run.fake.update(samples)
            run.second.update(samples)
        proposal = run.generator.propose(n, run.prompts(n, self.options.fake_updates))
        run.generator.update(run.teacher.score(proposal), run.fake.score(proposal), run.second.score(proposal))
