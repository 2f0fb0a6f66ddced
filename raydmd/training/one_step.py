"""DMD's generator: one step, with the choices that DMD's Algorithm 1 and Fig. 3a have beside plain matching."""

from dataclasses import replace

import torch

from raydmd.config.recipe import Recipe
from raydmd.training.generator import Generator
from raydmd.training.messages import BatchId, Noised, PromptBatch, Samples, Score


class OneStepGenerator(Generator):
    """Matches distributions on its samples, and on those from the noise of ODE pairs if it is told to.

    It can be made to seek the teacher's modes alone: a fake score of 0 is put in the place of the trained one.
    """

    def start_phase(self, index: int, updates: int) -> None:
        """Begin to train the expert."""
        super().start_phase(index, updates)
        self._references: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def propose(self, iteration: int, prompts: PromptBatch) -> Noised:
        """Make samples and noise them, [count, ...]; with reference samples behind them, [2 count, ...].

        These are made from the noise of the ODE pairs that the regression takes (DMD Algorithm 1).
        """
        proposal = super().propose(iteration, prompts)
        if not option(self.recipe, "reference_samples"):
            return proposal
        batch_id, (x_s, _) = proposal.batch_id, self._kept[prompts.start]
        made, target, on = self.from_pairs(batch_id, prompts.count)
        more = self.noised(Samples(batch_id, made, on.conditions), "reference")
        conditions = {name: torch.cat([value, more.conditions[name]]) for name, value in proposal.conditions.items()}
        both = Noised(batch_id, torch.cat([proposal.x_t, more.x_t]), torch.cat([proposal.t, more.t]), conditions)
        self._kept[prompts.start] = torch.cat([x_s, made]), both
        self._references[prompts.start] = made, target
        return both

    def objective(
        self, x_s: torch.Tensor, proposal: Noised, teacher: Score, fake: Score
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Return the gradient by x_s as `Generator` does."""
        if option(self.recipe, "real_score_only"):
            schedule, x_t = self.family.schedule, proposal.x_t
            flat = schedule.convert(torch.zeros_like(x_t), x_t, proposal.t, "score", self.family.prediction)
            fake = replace(fake, prediction=flat)
        return super().objective(x_s, proposal, teacher, fake)

    def regression_samples(self, batch_id: BatchId, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference samples where they are made already."""
        if batch_id.start in self._references:
            return self._references.pop(batch_id.start)
        return super().regression_samples(batch_id, count)


def option(recipe: Recipe, name: str) -> bool:
    """Return a switch of ``method.dmd``."""
    return bool(getattr(recipe.method.dmd, name))  # type: ignore[attr-defined]
