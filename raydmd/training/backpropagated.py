"""A generator whose objective is differentiated by other roles: the derivatives come back to its samples."""

import torch

from raydmd.diffusion.random import uniform
from raydmd.objectives.fisher import fisher_loss
from raydmd.training.generator import Generator
from raydmd.training.messages import BatchId, Cotangents, Noised, PromptBatch, Restored, Score
from raydmd.training.zeroed import broken_samples, by_role


class BackpropagatedGenerator(Generator):
    """Follows the sum of what comes back to its samples, by themselves and by the proposal's x_t."""

    figures = ("gradient", "x_s_mean", "x_s_std")

    def objective(self, x_s: torch.Tensor, proposal: Noised, *given: Cotangents) -> tuple[torch.Tensor, dict[str, int]]:  # type: ignore[override]
        """Take every derivative on to x_s."""
        total, made = torch.zeros_like(x_s), {"generator": x_s}
        for each in given:
            values = {name: value.to(self.device) for name, value in each.values.items()}
            if "x_s" in values:
                total = total + values["x_s"]
                made.setdefault(each.role, values["x_s"])
            if "x_t" in values:
                total = total + self.through_noising(proposal, values["x_t"])
                made.setdefault(each.role, values["x_t"])
        gradient, left_out = broken_samples(total * x_s[0].numel())
        return gradient, by_role(left_out, **made)

    def restore(self, iteration: int, prompts: PromptBatch) -> Restored:
        """Predict x_0 from ODE pairs at x_t = lerp(x_0, x_T), and keep the graph (DMDX Sec. 3.3).

        The times are cubic, t = (1 - u^3) of the noisiest: most of them are near it, where the student begins.

        Args:
            iteration: of the run.
            prompts: of the micro-batch; the pairs have their own.
        """
        batch_id = self._last_draw(iteration, prompts.start)
        u = uniform(self._key("restore-t", batch_id.draw), prompts.start, prompts.count)
        x0, real, proposal = self.from_pairs(batch_id, prompts.count, (1 - u**3) * self.phase.t_max)
        self._kept[prompts.start] = x0, proposal
        return Restored(batch_id, x0.detach(), real, proposal.conditions)

    def regress(self, iteration: int, prompts: PromptBatch) -> Cotangents:
        """Make samples in one call from the noise of the teacher's ODE pairs, and differentiate their distance.

        Args:
            iteration: of the run.
            prompts: of the micro-batch; the pairs have their own.
        """
        batch_id = self._last_draw(iteration, prompts.start)
        x0, target, proposal = self.from_pairs(batch_id, prompts.count)
        self._kept[prompts.start] = x0, proposal
        leaf = x0.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.pair_distance(leaf, target).sum(), leaf)
        return Cotangents(batch_id, "generator", {"x_s": gradient})

    def _last_draw(self, iteration: int, start: int) -> BatchId:
        draw = iteration * self.draws + self.draws - 1
        return BatchId(self.phase.index, draw, start, self.updates)


class FisherGenerator(BackpropagatedGenerator):
    """SiD's: follows the Fisher divergence between its own distribution and the teacher's (SiD Sec. 3)."""

    def cotangents(self, alpha: float, teacher: Score, fake: Score) -> Cotangents:
        """Differentiate SiD's loss by both predictions, and by x_s and x_t where they stand in it themselves.

        Args:
            alpha: SiD's.
            teacher: the teacher's prediction on the proposal.
            fake: the fake score's.
        """
        x_s, proposal = self._kept[teacher.batch_id.start]
        leaves = {
            "x_s": x_s, "x_t": proposal.x_t, "teacher": teacher.prediction, "fake": fake.prediction,
        }  # fmt: skip
        leaves = {name: value.detach().to(self.device).requires_grad_(True) for name, value in leaves.items()}
        loss = fisher_loss(
            self.family.schedule,
            leaves["x_s"],
            leaves["x_t"],
            leaves["teacher"],
            leaves["fake"],
            proposal.t,
            self.segment(proposal.batch_id.draw).end,
            self.family.prediction,
            alpha=alpha,
        )
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        return Cotangents(fake.batch_id, "generator", dict(zip(leaves, gradients, strict=True)))
