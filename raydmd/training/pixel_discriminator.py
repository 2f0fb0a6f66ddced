"""ADP's discriminator on pixels: a frozen pretrained backbone, trainable heads (DMDX Sec. 3.3 and its appendix)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from pydantic import Field

from raydmd.config.recipe import Recipe, Section, in_miniature
from raydmd.diffusion.random import Key, integer
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.models.heads import Heads
from raydmd.models.perceptual.backbones import BACKBONE, check_backbone, pixel_backbone
from raydmd.models.perceptual.sam import TINY
from raydmd.sampling.phase import Phase
from raydmd.training.discriminator import DiscriminatorOptions, discriminator_options
from raydmd.training.messages import Restored, Stepped
from raydmd.training.pair_discriminator import PairDiscriminator, Use
from raydmd.training.trainable_state import FlatParameters


class PixelOptions(Section):
    """The backbone that looks at decoded samples."""

    backbone: str = Field(
        "sam:facebook/sam-vit-huge",
        description="lpips:alex, lpips:vgg, torchvision:NAME, timm:NAME or sam:FOLDER_OR_HUB_NAME; sam:tiny: a random "
        "small one",
        json_schema_extra=in_miniature(f"sam:{TINY}"),
    )
    layers: tuple[str | int, ...] | None = Field(
        None, min_length=1, description="that it reads; null: sam's 3, 6, 9, 12, else four, evenly over the depth",
        json_schema_extra=in_miniature(None),
    )  # fmt: skip

    @property
    def names(self) -> list[str] | None:
        """The layers by name."""
        return None if self.layers is None else [str(layer) for layer in self.layers]


class PixelDiscriminatorOptions(DiscriminatorOptions):
    """The heads of the discriminators, and the backbone of the one on pixels."""

    pixel: PixelOptions = PixelOptions()

    def absolute(self) -> Self:
        """Return the options with a backbone's folder made absolute."""
        kind, _, source = self.pixel.backbone.partition(":")
        if not source or not (folder := Path(source).expanduser()).is_dir():
            return self
        pixel = self.pixel.model_copy(update={"backbone": f"{kind}:{folder.resolve()}"})
        return self.model_copy(update={"pixel": pixel})


def pixel_options(recipe: Recipe) -> PixelOptions:
    """Return ``method.discriminator.pixel``, which methods with such a discriminator have."""
    found: PixelOptions = discriminator_options(recipe).pixel  # type: ignore[attr-defined]
    return found


class PixelDiscriminator(PairDiscriminator):
    """Tells the generator's x_0 from the teacher's by their pixels, without noise; every frame of a video by itself.

    The backbone and the decoding are frozen; the heads' training keeps no graph of either.

    Args:
        recipe: the run's recipe.
        family: the kind of network, which decodes.
        teacher: not used.
        phases: the run's phases.
        device: where it computes.

    Raises:
        UserError: the family has no pixels, or the backbone cannot be made.
    """

    role = "pixel"
    figures = ("loss_pixel", "pixel_logit_real", "pixel_logit_generated")

    def __init__(
        self, recipe: Recipe, family: Family, teacher: Denoiser, phases: Sequence[Phase],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        self.phases, self.updates = list(phases), 0
        family.check_pixels(BACKBONE)
        options = pixel_options(recipe)
        self.pixel_backbone = pixel_backbone(options.backbone, options.names).to(self.device)
        self.shapes = self.pixel_backbone.feature_shapes(*family.picture_size)

    @staticmethod
    def check(recipe: Recipe, family: Family, hub: bool) -> list[str]:
        """Refuse, before a run, what the constructor would; return what only the hub can tell.

        Args:
            recipe: the run's recipe.
            family: its kind of network.
            hub: whether weights that are not on this machine are fetched.

        Raises:
            UserError: as the constructor.
        """
        family.check_pixels(BACKBONE)
        options = pixel_options(recipe)
        return check_backbone(options.backbone, options.names, hub)

    def start_phase(self, index: int, updates: int) -> None:
        """Make new heads, with a new optimizer.

        Args:
            index: of the phase.
            updates: made so far, over all phases.
        """
        self.phase, self.updates = self.phases[index], updates
        seed = integer(Key(self.recipe.seed, index, "pixel-heads", 0), 2**62)
        self.heads = Heads(self.shapes, discriminator_options(self.recipe).width, seed).to(self.device)
        self.flat = FlatParameters(dict(self.heads.named_parameters()), self.recipe.optimizer.of(self.role))

    def shown(self, restored: Restored, x_0: torch.Tensor, use: Use) -> Stepped:
        """Return x_0."""
        return Stepped(restored.batch_id, x_0, torch.zeros(len(x_0), dtype=torch.float64), restored.conditions)

    def logits(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return the logits [B, frames x heads] on ``x`` [B, ...], x_0; ``t`` and ``conditions`` are not used."""
        pixels = self.family.to_pixels(x)
        like = next(self.pixel_backbone.parameters())
        logits: torch.Tensor = self.heads(self.pixel_backbone(pixels.flatten(0, 1).to(like)))
        return logits.reshape(len(x), -1)
