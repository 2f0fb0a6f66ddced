"""DMDX: adversarial pre-training on ODE pairs (ADP), then adversarial distribution matching (DMDX Sec. 3)."""

from typing import Any, Self

from pydantic import Field

from raydmd.config.recipe import Positive, Recipe, in_miniature
from raydmd.errors import UserError
from raydmd.methods.adm import ADM, ADMOptions
from raydmd.methods.adp import ADP, ADPSection, pretrain, used_roles
from raydmd.methods.base import Program
from raydmd.models.base import Family
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations
from raydmd.training.pixel_discriminator import PixelDiscriminator, PixelDiscriminatorOptions


class DMDXSection(ADPSection):
    """The pre-training's own, and its length."""

    iterations: Positive = Field(
        300, description="generator updates before the first by ADM", json_schema_extra=in_miniature(1)
    )


class DMDXOptions(ADMOptions):
    """ADM's options, and the pre-training's."""

    adp: DMDXSection = DMDXSection()
    discriminator: PixelDiscriminatorOptions = PixelDiscriminatorOptions()

    def absolute(self) -> Self:
        """Return the options with local paths made absolute."""
        return self.model_copy(update={"discriminator": self.discriminator.absolute()})


class DMDX(ADM):
    """One expert, trained by ADP until a given iteration and by ADM from there; both are one phase of one run."""

    name, options_type, steps = "dmdx", DMDXOptions, 1
    roles = {**ADP.roles, **ADM.roles}
    options: DMDXOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.roles = used_roles(self.roles, self.options.adp)

    def check(self, family: Family, hub: bool = True) -> list[str]:
        """Have the pixel discriminator's backbone too."""
        pixel = PixelDiscriminator.check(self.recipe, family, hub) if self.options.adp.pixel_weight else []
        return [*super().check(family, hub), *pixel]

    def rollouts(self, run: Program, n: int) -> list[Any]:
        """The generator's samples for each of the fake score's updates, once it is trained."""
        return super().rollouts(run, n) if n >= self.options.adp.iterations else []

    def iteration(self, run: Program, n: int, rollouts: list[Any]) -> None:
        """Pre-train, or do what ADM does."""
        if n >= self.options.adp.iterations:
            super().iteration(run, n, rollouts)
        else:
            pretrain(run, n, run.prompts(n, self.options.fake_updates), self.options.adp)

    @property
    def pairs(self) -> int:
        """The teacher's ODE pairs."""
        return self.options.adp.pairs

    def phases(self, t_max: float) -> list[Phase]:
        """Leave iterations to ADM."""
        phases, own = super().phases(t_max), self.options.adp.iterations
        if own >= (total := sum(plan_iterations(self.recipe, phases))):
            raise UserError(f"method.adp.iterations: {own} of {total} leave ADM none; for ADP alone, method.name: adp")
        return phases

    def check_counts(self, steps: int, count: int) -> None:
        """Allow one phase: the pairs end at the data."""
        self.check_one_phase("method.adp", count)
        super().check_counts(steps, count)
