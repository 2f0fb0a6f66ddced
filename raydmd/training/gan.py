"""DMD2's parts: a classifier on the fake score's own features, and a generator that it pulls too (DMD2 Sec. 4.3)."""

import platform
from collections.abc import Sequence

import torch
from torch import nn

from raydmd.config.recipe import Recipe
from raydmd.data.row_order import RowGroup, RowOrder
from raydmd.diffusion.random import normal
from raydmd.errors import UserError
from raydmd.models.base import Denoiser, Family
from raydmd.models.features import read_features
from raydmd.models.pictures import encode_pictures, open_pictures
from raydmd.objectives.adversarial import discriminator_loss, generator_loss
from raydmd.sampling.phase import Phase
from raydmd.training.discriminator import new_heads
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import BatchId, Cotangents, Noised, PromptBatch, Samples, Score
from raydmd.training.score_network import vector_jacobian
from raydmd.training.trainable_state import FlatParameters
from raydmd.training.zeroed import broken_samples, by_role

PICTURES = "method.dmd2.pictures"  # the recipe's key, which errors name


class ClassifyingFake(Fake):
    """A fake score with heads that tell noised references from noised samples; both train its network."""

    figures = ("loss_fake", "loss_classifier", "logit_real", "logit_generated")

    def start_phase(self, index: int, updates: int) -> None:
        """Re-make the fake score, with new heads and a new optimizer of both."""
        super().start_phase(index, updates)
        self.blocks, heads = new_heads(self.network, self.family, self.recipe, index)
        self.heads = heads.to(self.device)
        both = nn.ModuleDict({"network": self.network, "heads": self.heads})
        self.flat = FlatParameters(dict(both.named_parameters()), self.recipe.optimizer.of(self.role))

    def losses(self, samples: Samples, references: Samples) -> tuple[torch.Tensor, dict[str, float]]:  # type: ignore[override]
        """Add the classifier's loss, on references that are noised to the same times."""
        x_s, noise, t, x_t = self.noised(samples)
        output, features = self._read(x_t, t, samples)
        loss = self.matching_loss(samples, output, x_s, noise, t)
        batch_id, x_0 = references.batch_id, references.x_s.to(self.device)
        fresh = normal(self._key("real-noise", batch_id.draw), batch_id.start, len(x_0), tuple(x_0.shape[1:]))
        _, right = self._read(self.family.schedule.diffuse(x_0, fresh.to(self.device), t), t, references)
        logits = self.heads(right), self.heads(features)
        verdict = discriminator_loss(*logits, "softplus")
        values = (float(each.detach().mean()) for each in (loss, verdict, *logits))
        return loss + self.recipe.method.dmd2.classifier_weight * verdict, dict(zip(self.figures, values, strict=True))  # type: ignore[attr-defined]

    def classifier_vjp(self, proposal: Noised) -> Cotangents:
        """Differentiate the generator's GAN loss by the proposal's x_t."""

        def loss(x: torch.Tensor) -> torch.Tensor:
            return generator_loss(self.heads(self._read(x, proposal.t, proposal)[1]), "softplus")

        x_t = proposal.x_t.to(self.device)
        gradient = vector_jacobian(loss, x_t, torch.ones(len(x_t)))
        return Cotangents(self.with_version(proposal.batch_id), self.role, {"x_t": gradient})

    def _read(
        self, x_t: torch.Tensor, t: torch.Tensor, of: Samples | Noised
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return read_features(self.network, self.blocks, x_t, t.to(self.device), self.on_device(of.conditions))


class ReferencedGenerator(Generator):
    """Holds the references, and follows the classifier beside the scores.

    They are the teacher's own many-step samples, or pictures of ``method.dmd2.pictures``, which every worker reads by
    itself.

    Raises:
        UserError: a folder of pictures that cannot be used.
    """

    def __init__(
        self, recipe: Recipe, family: Family, teacher: Denoiser, phases: Sequence[Phase],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(recipe, family, teacher, phases, device)
        folder: str | None = recipe.method.dmd2.pictures  # type: ignore[attr-defined]
        if folder is not None:
            try:
                self._pictures = open_pictures(family, folder, PICTURES)
            except UserError as error:  # the driver could use it
                where = f"on {platform.node()}: every generator worker reads the folder by itself"
                raise UserError(f"{error} ({where})") from None
            self._picture_order = RowOrder(recipe.seed, "references", [RowGroup(len(self._pictures), 0)])
        self._real = folder is not None

    def references(self, iteration: int, update: int, prompts: PromptBatch) -> Samples:
        """Return references x_0 [count, ...] for fake update ``update``; the batches walk all of them.

        Raises:
            UserError: a picture that cannot be decoded, or whose row of the metadata the family does not take.
        """
        updates = self.recipe.method.fake_updates
        first = (iteration * updates + update) * self.recipe.batch.size + prompts.start
        draw = iteration * self.draws + update
        if self._real:
            numbers, family = self._picture_order.rows(first, prompts.count), self.buckets.family(draw)
            pictures = self._pictures.resized(family.picture_shape)
            x_0, conditions = encode_pictures(family, pictures, numbers, self.device)
        else:
            _, x_0, conditions = self.take_pairs("references", first, prompts.count)
        return Samples(BatchId(self.phase.index, draw, prompts.start, self.updates), x_0, conditions)

    def objective(  # type: ignore[override]
        self, x_s: torch.Tensor, proposal: Noised, teacher: Score, fake: Score, classifier: Cotangents
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Add the GAN's gradient to distribution matching's."""
        matching, left_out = super().objective(x_s, proposal, teacher, fake)
        by_x_t = classifier.values["x_t"].to(self.device)
        pull = self.through_noising(proposal, by_x_t) * x_s[0].numel()
        gradient, broken = broken_samples(matching + self.recipe.method.dmd2.generator_weight * pull)  # type: ignore[attr-defined]
        more = by_role(broken, fake=by_x_t)
        return gradient, {role: left_out.get(role, 0) + more.get(role, 0) for role in {*left_out, *more}}
