"""ADP: adversarial pre-training of a one-step student on the teacher's ODE pairs (DMDX Sec. 3.3)."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from raydmd.config.recipe import MethodOptions, Positive, Recipe, Section, in_miniature
from raydmd.methods.base import TEACHER, Frozen, Program, Trained
from raydmd.methods.distribution_matching import DistributionMatching
from raydmd.models.base import Family
from raydmd.training.backpropagated import BackpropagatedGenerator
from raydmd.training.discriminator import check_blocks
from raydmd.training.pair_discriminator import LatentDiscriminator
from raydmd.training.pixel_discriminator import PixelDiscriminator, PixelDiscriminatorOptions


class ADPSection(Section):
    """The pre-training's own."""

    pairs: Positive = Field(
        4096, description="the teacher's ODE pairs that it is trained on", json_schema_extra=in_miniature(8)
    )
    latent_weight: float = Field(0.85, ge=0, description="of the latent discriminator in the generator's loss")
    pixel_weight: float = Field(
        0.0, ge=0, description="of the pixel discriminator; DMDX's is .15; 0: there is none (role `pixel`)"
    )


class ADPOptions(MethodOptions):
    """The common options, the pre-training's and its discriminators'."""

    adp: ADPSection = ADPSection()
    discriminator: PixelDiscriminatorOptions = PixelDiscriminatorOptions()

    def absolute(self) -> Self:
        """Return the options with local paths made absolute."""
        return self.model_copy(update={"discriminator": self.discriminator.absolute()})


def pretrain(run: Program, n: int, prompts: Any, own: ADPSection) -> None:
    """Train the discriminators on what the student makes of the pairs, then the student on their verdicts."""
    restored = run.generator.restore(n, prompts)
    run.latent.update(restored)
    if not own.pixel_weight:
        run.generator.update(run.latent.vjp(own.latent_weight, restored))
        return
    run.pixel.update(restored)
    run.generator.update(run.latent.vjp(own.latent_weight, restored), run.pixel.vjp(own.pixel_weight, restored))


def used_roles(roles: Mapping[str, Trained | Frozen], own: ADPSection) -> dict[str, Trained | Frozen]:
    """Return the roles without the pixel discriminator where it has no weight."""
    return {name: role for name, role in roles.items() if own.pixel_weight or name != PixelDiscriminator.role}


class ADP(DistributionMatching):
    """One phase of one step; there is no fake score."""

    name, options_type, steps = "adp", ADPOptions, 1
    roles = {
        "generator": Trained(BackpropagatedGenerator), "latent": Trained(LatentDiscriminator),
        "pixel": Trained(PixelDiscriminator), "teacher": TEACHER,
    }  # fmt: skip
    options: ADPOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.roles = used_roles(self.roles, self.options.adp)

    def check(self, family: Family, hub: bool = True) -> list[str]:
        """Have the latent discriminator's blocks, and the pixel discriminator's backbone and pixels."""
        check_blocks(self.recipe, family)
        return PixelDiscriminator.check(self.recipe, family, hub) if self.options.adp.pixel_weight else []

    def rollouts(self, run: Program, n: int) -> list[Any]:
        """Make none."""
        return []

    def iteration(self, run: Program, n: int, rollouts: list[Any]) -> None:
        """Pre-train."""
        pretrain(run, n, run.prompts(n, 0), self.options.adp)

    def prepare(self, run: Program, n: int) -> None:
        """There is nothing to prepare."""

    @property
    def draws(self) -> tuple[str, ...]:
        """The generator's own."""
        return ("generator",)

    @property
    def pairs(self) -> int:
        """The teacher's ODE pairs."""
        return self.options.adp.pairs
