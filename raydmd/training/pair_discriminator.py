"""ADP's discriminators: they tell the generator's x_0 from the teacher's of the same ODE pair (DMDX Sec. 3.3)."""

from abc import abstractmethod
from typing import Literal

import torch

from raydmd.diffusion.random import Key, normal, uniform
from raydmd.objectives.adversarial import generator_loss
from raydmd.training.collective import Alone, Collective
from raydmd.training.discriminator import Discriminator
from raydmd.training.messages import Cotangents, Restored, Stepped, UpdateStats
from raydmd.training.score_network import vector_jacobian

Use = Literal["real", "generated", "vjp"]


class PairDiscriminator(Discriminator):
    """Judges what is made of x_0; what that is, is `shown`'s."""

    @abstractmethod
    def shown(self, restored: Restored, x_0: torch.Tensor, use: Use) -> Stepped:
        """Return what is judged of ``x_0`` [B, ...], the generator's or the teacher's; it can be differentiated by it.

        Args:
            restored: the micro-batch.
            x_0: on this part's device.
            use: for what; each has random numbers of its own.
        """

    def update(self, restored: list[Restored], *, collective: Collective | None = None) -> UpdateStats:  # type: ignore[override]
        """Train the heads on this replica's micro-batches, and step with the others'.

        Args:
            restored: the generator's x_0 and the teacher's.
            collective: the peers.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        real = [self.shown(each, each.real.to(self.device), "real") for each in restored]
        generated = [self.shown(each, each.x.to(self.device), "generated") for each in restored]
        return self._train(real, generated, collective or Alone())

    def vjp(self, weight: float, restored: Restored) -> Cotangents:  # type: ignore[override]
        """Differentiate ``weight`` times the generator's loss by its x_0, the ``x_s`` of a phase that ends there."""

        def loss(x_0: torch.Tensor) -> torch.Tensor:
            judged = self.shown(restored, x_0, "vjp")
            return generator_loss(self.logits(judged.x, judged.t, judged.conditions), self.loss)

        x_0 = restored.x.to(self.device)
        gradient = vector_jacobian(loss, x_0, torch.full((len(x_0),), weight))
        return Cotangents(restored.batch_id, self.role, {"x_s": gradient})


class LatentDiscriminator(PairDiscriminator):
    """Judges x_0, noised to times of its own, by the teacher's blocks."""

    role = "latent"
    figures = ("loss_latent", "latent_logit_real", "latent_logit_generated")

    def shown(self, restored: Restored, x_0: torch.Tensor, use: Use) -> Stepped:
        """Return x_t."""
        batch_id, index = restored.batch_id, self.phase.index
        u = uniform(Key(self.recipe.seed, index, f"latent-{use}-t", batch_id.draw), batch_id.start, len(x_0))
        t = self.phase.score_times(self.recipe.method, u)
        key = Key(self.recipe.seed, index, f"latent-{use}-noise", batch_id.draw)
        noise = normal(key, batch_id.start, len(x_0), tuple(x_0.shape[1:])).to(self.device)
        return Stepped(batch_id, self.family.schedule.diffuse(x_0, noise, t), t, restored.conditions)
