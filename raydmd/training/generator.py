"""The generator's part of an iteration: rollouts, a proposal to be scored, the distribution-matching update."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.row_order import RowGroup, RowOrder
from raydmd.data.trajectories import Pairs
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.models.base import Denoiser, Family
from raydmd.models.experts import Experts
from raydmd.objectives.distribution_matching import distribution_matching_gradient, surrogate_loss
from raydmd.objectives.regression import regression_loss
from raydmd.sampling.phase import Phase
from raydmd.sampling.student import exit_step, rollout
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import BatchId, Noised, PromptBatch, Samples, Score, UpdateStats
from raydmd.training.trainable_state import FlatParameters
from raydmd.training.zeroed import by_role


class Generator:
    """Trains one expert a phase; earlier experts are frozen.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: its weights, from which every expert starts.
        phases: the run's phases.
        device: where it computes.
    """

    figures: tuple[str, ...] = ("dm_gradient", "x_s_mean", "x_s_std")

    def __init__(
        self, recipe: Recipe, family: Family, teacher: Denoiser, phases: Sequence[Phase],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        self.phases = list(phases)
        kind = recipe.method.experts
        self.teacher = teacher.to(self.device)
        self.experts = Experts(
            self.teacher,
            len(self.phases),
            kind.kind,
            kind.rank,
            kind.alpha,
            family.lora_targets,
            recipe.seed,
        )
        self.draws = recipe.method.fake_updates + 1
        self.pairs: Pairs | None = None
        self._pair_order = RowOrder(recipe.seed, "regression", [RowGroup(recipe.method.regression.pairs, 0)])
        self.updates, self.ended = 0, False  # over all phases; whether the phase's expert is fixed
        self._kept: dict[int, tuple[torch.Tensor, Noised]] = {}
        self._entries: dict[tuple[int, int], torch.Tensor] = {}

    def start_phase(self, index: int, updates: int) -> None:
        """Make expert ``index`` from the teacher and begin to train it, with a new optimizer.

        Args:
            index: of the phase.
            updates: made so far, over all phases.
        """
        self.phase, self.updates, self.ended = self.phases[index], updates, False
        self.experts.start(index)
        parameters = self.experts.trainable_parameters()
        self.flat = FlatParameters(parameters, self.recipe.optimizer.generator, self.recipe.ema)
        self._kept.clear()
        self._entries.clear()

    def end_phase(self) -> dict[str, torch.Tensor]:
        """Give the expert its averaged weights for good, and return them by name; a second call changes nothing."""
        if not self.ended:
            self.flat.swap_average()
            self.ended = True
        return self.experts.state(self.phase.index)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that the next update depends on."""
        if not self.ended:
            return self.flat.state()
        self.flat.swap_average()  # as it was before the phase was ended
        try:
            return self.flat.state()
        finally:
            self.flat.swap_average()

    def prepare(self, iteration: int, *prompts: PromptBatch) -> None:
        """Make ahead what the frozen experts contribute to an iteration's rollouts: no version of the weights counts.

        Args:
            iteration: of the run.
            prompts: of a micro-batch of each draw.
        """
        if self.phase.index:
            for update, batch in enumerate(prompts):
                draw = iteration * self.draws + update
                self._entries[draw, batch.start] = self._roll(self.phase.index, draw, batch)

    def rollout(self, iteration: int, update: int, prompts: PromptBatch) -> Samples:
        """Make the samples [count, ...] of fake update ``update``, without gradient."""
        return self._samples(iteration, update, prompts, grad=False)

    def propose(self, iteration: int, prompts: PromptBatch) -> Noised:
        """Make the generator's own samples, keep their graph, and noise them for scoring (Phased DMD Eq. 11)."""
        samples = self._samples(iteration, self.draws - 1, prompts, grad=True)
        method, schedule, start, count = self.recipe.method, self.family.schedule, prompts.start, prompts.count
        u = uniform(self._key("score-t", samples.batch_id.draw), start, count)
        t = self.phase.score_times(method, u)
        noise = normal(self._key("score-noise", samples.batch_id.draw), start, count, self.family.latent_shape)
        x_t = schedule.diffuse(samples.x_s.detach(), noise.to(self.device), t, self.phase.end)
        proposal = Noised(samples.batch_id, x_t, t, samples.conditions)
        self._kept[start] = samples.x_s, proposal
        return proposal

    def update(self, teacher: list[Score], fake: list[Score], collective: Collective | None = None) -> UpdateStats:
        """Apply the distribution-matching gradient to this replica's proposals, and step with the others'."""
        method, gradients, micro, zeroed = self.recipe.method, [], [], Counter[str]()
        with self.flat.attempt():
            for number, (real, generated) in enumerate(zip(teacher, fake, strict=True), start=1):
                x_s, proposal = self._kept.pop(real.batch_id.start)
                assert proposal.batch_id.draw == real.batch_id.draw == generated.batch_id.draw, (
                    "scores of another iteration"
                )
                predictions = real.prediction.to(self.device), generated.prediction.to(self.device)
                gradient, left_out = distribution_matching_gradient(
                    self.family.schedule,
                    x_s.detach(),
                    proposal.x_t,
                    *predictions,
                    proposal.t,
                    self.phase.end,
                    self.family.prediction,
                    weight=method.gradient_weight,
                )
                zeroed.update(by_role(left_out, x_s.detach(), *predictions))
                share = x_s.shape[0] / self.recipe.batch.size
                loss = surrogate_loss(x_s, gradient) * share
                if self.pairs is not None:
                    loss = loss + method.regression.weight * share * self._regression(proposal.batch_id, x_s.shape[0])
                loss.backward()
                gradients.append(self.flat.take_gradient(last=number == len(teacher)))
                mean, spread = float(x_s.detach().mean()), float(x_s.detach().std())
                row = {"dm_gradient": float(gradient.abs().mean()), "x_s_mean": mean, "x_s_std": spread}
                micro.append((proposal.batch_id.start, row))
            try:
                norm = self.flat.step(gradients, self.recipe.batch.micros, collective or Alone())
            except FloatingPointError as error:
                if not all(math.isfinite(row["x_s_mean"]) for _, row in micro):
                    raise FloatingPointError(f"{error}: nor are the generator's own samples") from error
                raise
        self.updates += 1
        self._kept.clear()  # of calls that were dropped and made again by another replica
        self._entries = {key: x for key, x in self._entries.items() if key[0] >= self.updates * self.draws}
        return UpdateStats(norm, micro, self.updates, dict(zeroed))

    def _samples(self, iteration: int, update: int, prompts: PromptBatch, grad: bool) -> Samples:
        draw = iteration * self.draws + update
        entry = self._entries.pop((draw, prompts.start), None)
        x_s = self._roll(self.phase.index + 1, draw, prompts, entry, grad)
        conditions = {name: value.to(self.device) for name, value in prompts.conditions.items()}
        return Samples(BatchId(self.phase.index, draw, prompts.start, self.updates), x_s, conditions)

    def _roll(
        self, phases: int, draw: int, prompts: PromptBatch, entry: torch.Tensor | None = None, grad: bool = False
    ) -> torch.Tensor:
        """Roll out through the first ``phases`` phases; the one in training is left at its exit step."""
        training = phases == self.phase.index + 1
        return rollout(
            self.family,
            self.experts,
            self.phases[:phases],
            self._key("rollout", draw),
            prompts.start,
            {name: value.to(self.device) for name, value in prompts.conditions.items()},
            prompts.count,
            solver=self.recipe.method.solver,
            leave=exit_step(self.phase, self._key("exit", draw)) if training else None,
            grad=grad,
            entry=entry,
            device=self.device,
        )

    def _regression(self, batch_id: BatchId, count: int) -> torch.Tensor:
        """L2 between the student's and the teacher's result from the same noise (DMD Sec. 3.3).

        The batches walk all pairs, in a new order each time round.
        """
        assert self.pairs is not None
        first = batch_id.draw // self.draws * self.recipe.batch.size + batch_id.start
        noise, target, conditions = self.pairs.take(self._pair_order.rows(first, count))
        t = torch.full((count,), self.phase.times[0], dtype=torch.float64, device=self.device)
        prediction = self.experts.expert(self.phase.index)(noise, t, conditions)
        x0 = self.family.schedule.convert(prediction, noise, t, self.family.prediction, "x0")
        return regression_loss(x0, target).mean()

    def _key(self, stream: str, draw: int) -> Key:
        return Key(self.recipe.seed, self.phase.index, stream, draw)
