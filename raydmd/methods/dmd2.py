"""DMD2: distribution matching, with a GAN on the fake score's features in place of regression (DMD2 Sec. 4)."""

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from raydmd.config.recipe import MethodOptions, Positive, Section, in_miniature
from raydmd.errors import UserError
from raydmd.methods.base import TEACHER, Program, Trained
from raydmd.methods.distribution_matching import DistributionMatching
from raydmd.models.base import Family
from raydmd.models.buckets import Buckets
from raydmd.models.pictures import encode_pictures, open_pictures, picture_conditions
from raydmd.training.discriminator import DiscriminatorOptions, check_blocks
from raydmd.training.gan import PICTURES, ClassifyingFake, ReferencedGenerator

REFERENCES = 1024  # of the teacher's own samples, by default
LOOKED_THROUGH = 64 * 2**20  # bytes of metadata, all of whose rows are encoded before a run


class DMD2Section(Section):
    """DMD2's own."""

    generator_weight: float = Field(5e-3, ge=0, description="of the GAN in the generator's loss")
    classifier_weight: float = Field(1e-2, ge=0, description="of the classifier in the fake score's loss")
    pictures: str | None = Field(
        None, description="a folder of real pictures (imagefolder) that all generator workers can read; null: none"
    )
    references: Positive | None = Field(
        None, description="the teacher's own samples that stand for real ones; null: 1024, or none with pictures",
        json_schema_extra=in_miniature(8),
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_kind_of_references(self) -> Self:
        if self.pictures is not None and self.references is not None:
            raise ValueError(
                "method.dmd2.references: the teacher makes no samples where there are method.dmd2.pictures; leave one "
                "of the two out"
            )
        return self


class DMD2Options(MethodOptions):
    """The common options, with DMD2's sampler, its own and its classifier's."""

    solver: Literal["euler", "renoise"] = Field(
        "renoise", description="steps between the times: euler's, or to x_0 and noised anew"
    )
    dmd2: DMD2Section = DMD2Section()
    discriminator: DiscriminatorOptions = DiscriminatorOptions()

    def absolute(self) -> Self:
        """Return the options with the pictures' folder made absolute."""
        if self.dmd2.pictures is None or not (found := Path(self.dmd2.pictures).expanduser()).exists():
            return self
        return self.model_copy(update={"dmd2": self.dmd2.model_copy(update={"pictures": str(found.resolve())})})


class DMD2(DistributionMatching):
    """One phase; the student re-noises between its steps."""

    name, options_type = "dmd2", DMD2Options
    roles = {"generator": Trained(ReferencedGenerator), "fake": Trained(ClassifyingFake), "teacher": TEACHER}
    options: DMD2Options

    def iteration(self, run: Program, n: int, rollouts: list[Any]) -> None:
        """Train the fake score and its classifier, then the generator on both scores and the classifier."""
        for update, samples in enumerate(rollouts):
            run.fake.update(samples, run.generator.references(n, update, run.prompts(n, update)))
        proposal = run.generator.propose(n, run.prompts(n, self.options.fake_updates))
        scores = run.teacher.score(proposal), run.fake.score(proposal)
        run.generator.update(*scores, run.fake.classifier_vjp(proposal))

    @property
    def pairs(self) -> int:
        """The teacher's samples, with the noise that they are from; none where there are pictures."""
        own = self.options.dmd2
        return 0 if own.pictures is not None else own.references or REFERENCES

    def check(self, family: Family, hub: bool = True) -> list[str]:
        """Encode the first picture, and the metadata's rows: all of a small file's, of a large one's the first."""
        check_blocks(self.recipe, family)
        if self.options.dmd2.pictures is None:
            return []
        pictures = open_pictures(family, self.options.dmd2.pictures, PICTURES)
        for sized in Buckets(self.recipe, family).families:
            try:
                pictures.resized(sized.picture_shape)
            except UserError as error:
                raise UserError(f"{PICTURES}: {error}") from None
        small = pictures.metadata is None or pictures.metadata.size <= LOOKED_THROUGH
        conditions = picture_conditions(family, pictures, np.arange(len(pictures) if small else 1))
        if family.path is not None:
            family.check_conditions(conditions)
        encode_pictures(family, pictures, np.arange(1))
        return []
