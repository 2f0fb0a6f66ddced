"""A discriminator's part: frozen blocks of the teacher, trainable heads (DMDX Sec. 3.2 and its appendix)."""

from collections.abc import Sequence

import torch
from pydantic import Field

from raydmd.config.recipe import Positive, Recipe, Section, in_miniature
from raydmd.diffusion.random import Key, integer
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.models.buckets import Buckets
from raydmd.models.features import chosen_blocks, read_features
from raydmd.models.heads import Heads
from raydmd.objectives.adversarial import AdversarialLoss, discriminator_loss, generator_loss
from raydmd.sampling.phase import Phase
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import Cotangents, Stepped, UpdateStats
from raydmd.training.score_network import vector_jacobian
from raydmd.training.trainable_state import FlatParameters
from raydmd.training.zeroed import finite_samples, zero_others

BLOCKS = "method.discriminator.blocks"


class DiscriminatorOptions(Section):
    """A discriminator's heads."""

    blocks: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="blocks that it reads, by name (blocks.0 ...); null: four, evenly over the depth",
    )
    width: Positive = Field(256, description="channels of a head's hidden layers", json_schema_extra=in_miniature(32))


def discriminator_options(recipe: Recipe) -> DiscriminatorOptions:
    """Return ``method.discriminator``, which methods with one have."""
    found: DiscriminatorOptions = recipe.method.discriminator  # type: ignore[attr-defined]
    return found


def check_blocks(recipe: Recipe, family: Family) -> None:
    """Refuse blocks that the family's network does not have.

    Raises:
        UserError: one line that names the key and the block.
    """
    chosen_blocks(family.outline(), discriminator_options(recipe).blocks, BLOCKS)


def new_heads(network: Denoiser, family: Family, recipe: Recipe, phase: int) -> tuple[list[str], Heads]:
    """Return the blocks that are read, and a head for each with new weights, which the phase and the seed give.

    A head takes samples of every bucket: it halves a map's sides as often as the smallest one's can be.

    Raises:
        UserError: a block that the network does not have.
    """
    options = discriminator_options(recipe)
    blocks = chosen_blocks(network, options.blocks, BLOCKS)
    latents = Buckets(recipe, family).least()
    shapes = [network.block_shape(name, latents) for name in blocks]
    return blocks, Heads(shapes, options.width, integer(Key(recipe.seed, phase, "heads", 0), 2**62))


class Discriminator:
    """Tells the teacher's latents from the fake score's, at t - dt.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: its weights; its blocks are the backbone.
        phases: the run's phases.
        device: where it computes.
    """

    role = "discriminator"
    figures: tuple[str, ...] = ("loss_discriminator", "logit_real", "logit_generated")
    loss: AdversarialLoss = "hinge"

    def __init__(
        self, recipe: Recipe, family: Family, teacher: Denoiser, phases: Sequence[Phase],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        self.phases = list(phases)
        self.backbone = teacher.to(self.device).requires_grad_(False).eval()
        self.updates = 0

    def start_phase(self, index: int, updates: int) -> None:
        """Make new heads, with a new optimizer.

        Args:
            index: of the phase.
            updates: made so far, over all phases.
        """
        self.phase, self.updates = self.phases[index], updates
        self.blocks, heads = new_heads(self.backbone, self.family, self.recipe, index)
        self.heads = heads.to(self.device)
        self.flat = FlatParameters(dict(self.heads.named_parameters()), self.recipe.optimizer.of(self.role))

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that the next update depends on."""
        return self.flat.state()

    def update(
        self, real: list[Stepped], generated: list[Stepped], *, collective: Collective | None = None
    ) -> UpdateStats:
        """Train the heads on this replica's micro-batches, and step with the others'.

        Args:
            real: the teacher's latents.
            generated: the fake score's, from the same x_t.
            collective: the peers.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        return self._train(real, generated, collective or Alone())

    def _train(self, real: list[Stepped], generated: list[Stepped], collective: Collective) -> UpdateStats:
        """Leave out what is not finite; count what the teacher made so, for the rest the generator's update counts."""
        gradients, micro, broken = [], [], 0
        with self.flat.attempt():
            for number, (right, wrong) in enumerate(zip(real, generated, strict=True), start=1):
                finite = [finite_samples(each.x.to(self.device)) for each in (right, wrong)]
                kept, broken = finite[0] & finite[1], broken + int((~finite[0]).sum())
                on_real, on_generated = (
                    self.logits(zero_others(kept, each.x.to(self.device)), each.t, each.conditions)
                    for each in (right, wrong)
                )
                loss = zero_others(kept, discriminator_loss(on_real, on_generated, self.loss))
                (loss.sum() / self.recipe.batch.size).backward()
                gradients.append(self.flat.take_gradient(last=number == len(real)))
                values = (float(each.detach().mean()) for each in (loss, on_real, on_generated))
                micro.append((wrong.batch_id.start, dict(zip(self.figures, values, strict=True))))
            norm = self.flat.step(gradients, self.recipe.batch.micros, collective)
        self.updates += 1
        return UpdateStats(norm, micro, self.updates, {"teacher": broken} if broken else {}, self.flat.lr)

    def vjp(self, generated: Stepped) -> Cotangents:
        """Differentiate the generator's loss by the fake score's latents ``x``."""

        def loss(x: torch.Tensor) -> torch.Tensor:
            return generator_loss(self.logits(x, generated.t, generated.conditions), self.loss)

        x = generated.x.to(self.device)
        gradient = vector_jacobian(loss, x, torch.ones(len(x)))
        return Cotangents(generated.batch_id, self.role, {"x": gradient})

    def logits(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return the logits [B, heads] on ``x`` [B, ...] at ``t`` [B]."""
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        _, features = read_features(self.backbone, self.blocks, x, t.to(self.device), conditions)
        logits: torch.Tensor = self.heads(features)
        return logits
