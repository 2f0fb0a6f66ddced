"""The generator's part of an iteration: rollouts, a proposal to be scored, the distribution-matching update."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.row_order import RowGroup, RowOrder
from raydmd.data.trajectories import PairSource
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.diffusion.schedule import broadcast
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.models.buckets import Buckets
from raydmd.models.experts import Experts
from raydmd.models.initial_student import initial_state
from raydmd.objectives.distribution_matching import distribution_matching_gradient, surrogate_loss
from raydmd.objectives.regression import regression_loss
from raydmd.sampling.phase import Phase
from raydmd.sampling.student import exit_step, rollout
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import BatchId, Noised, PromptBatch, Samples, Score, UpdateStats
from raydmd.training.pair_distance import PairDistance, PixelDistance
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
        self.buckets = Buckets(recipe, family)
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
            [phase.interval for phase in self.phases],
        )
        self.draws = recipe.method.fake_updates + 1
        self.pairs: PairSource | None = None
        self._pair_order: RowOrder | None = None
        self.updates, self.ended = 0, False  # over all phases; whether the phase's expert is fixed
        self._kept: dict[int, tuple[torch.Tensor, Noised]] = {}
        self._entries: dict[tuple[int, int], torch.Tensor] = {}

    def start_phase(self, index: int, updates: int) -> None:
        """Make expert ``index`` from the teacher, or from ``method.init``, and begin to train it by a new optimizer.

        Args:
            index: of the phase.
            updates: made so far, over all phases.

        Raises:
            UserError: ``method.init`` does not fit, or is not on this machine.
        """
        self.phase, self.updates, self.ended = self.phases[index], updates, False
        self.experts.start(index)
        if (init := self.recipe.method.init) is not None:
            state = initial_state(init, index, len(self.phases), self.experts.names(index))
            self.experts.load_state(index, state)
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
        proposal = self.noised(samples, "score")
        self._kept[prompts.start] = samples.x_s, proposal
        return proposal

    def noised(self, samples: Samples, stream: str) -> Noised:
        """Noise samples for scoring, each to a time of its own, with a stream's numbers; detached."""
        start, draw, count = samples.batch_id.start, samples.batch_id.draw, samples.x_s.shape[0]
        phase = self.segment(draw)
        t = phase.score_times(self.recipe.method, uniform(self._key(f"{stream}-t", draw), start, count))
        noise = normal(self._key(f"{stream}-noise", draw), start, count, tuple(samples.x_s.shape[1:]))
        x_t = self.family.schedule.diffuse(samples.x_s.detach(), noise.to(self.device), t, phase.end)
        return Noised(samples.batch_id, x_t, t, samples.conditions)

    def update(self, *inputs: list[Any], collective: Collective | None = None) -> UpdateStats:
        """Apply the objective's gradient to this replica's proposals, and step with the others'.

        Args:
            inputs: what `objective` takes, a list for each, of one entry a micro-batch.
            collective: the peers.
        """
        gradients, micro, zeroed = [], [], Counter[str]()
        with self.flat.attempt():
            for number, given in enumerate(zip(*inputs, strict=True), start=1):
                x_s, proposal = self._kept.pop(given[0].batch_id.start)
                assert all(each.batch_id.draw == proposal.batch_id.draw for each in given), (
                    "inputs of another iteration"
                )
                gradient, left_out = self.objective(x_s.detach(), proposal, *given)
                zeroed.update(left_out)
                share = 1 / self.recipe.batch.micros
                loss = surrogate_loss(x_s, gradient) * share
                if (weight := self.recipe.method.regression.weight) and self.pairs is not None:
                    loss = loss + weight * share * self._regression(proposal.batch_id)
                loss.backward()
                gradients.append(self.flat.take_gradient(last=number == len(inputs[0])))
                mean, spread = float(x_s.detach().mean()), float(x_s.detach().std())
                row = {self.figures[0]: float(gradient.abs().mean()), "x_s_mean": mean, "x_s_std": spread}
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
        return UpdateStats(norm, micro, self.updates, dict(zeroed), self.flat.lr)

    def objective(
        self, x_s: torch.Tensor, proposal: Noised, teacher: Score, fake: Score
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Distribution matching (DMD Eqs. 7, 8; Phased DMD Eq. 11), for a micro-batch.

        Returns:
            The gradient [B, ...] of each sample's loss by x_s, times the number of its elements, and 0 for samples that
            are left out; how many of these each role is to blame for.
        """
        predictions = teacher.prediction.to(self.device), fake.prediction.to(self.device)
        gradient, left_out = distribution_matching_gradient(
            self.family.schedule,
            x_s,
            proposal.x_t,
            *predictions,
            proposal.t,
            self.segment(proposal.batch_id.draw).end,
            self.family.prediction,
            weight=self.recipe.method.gradient_weight,
        )
        return gradient, by_role(left_out, generator=x_s, teacher=predictions[0], fake=predictions[1])

    def through_noising(self, proposal: Noised, gradient: torch.Tensor) -> torch.Tensor:
        """Take a derivative by the proposal's x_t on to x_s: x_t = alpha_{t|s} x_s + sigma_{t|s} eps."""
        alpha = self.family.schedule.bridge(self.segment(proposal.batch_id.draw).end, proposal.t).alpha
        return broadcast(alpha, gradient) * gradient

    def segment(self, draw: int) -> Phase:
        """Return what of the phase in training a draw's samples walk, and where they end; by default, all of it."""
        return self.phase

    def exit(self, draw: int) -> int:
        """Return the step at which a draw's samples leave their segment."""
        return exit_step(self.phase, self._key("exit", draw))

    def _samples(self, iteration: int, update: int, prompts: PromptBatch, grad: bool) -> Samples:
        draw = iteration * self.draws + update
        entry = self._entries.pop((draw, prompts.start), None)
        x_s = self._roll(self.phase.index + 1, draw, prompts, entry, grad)
        conditions = {name: value.to(self.device) for name, value in prompts.conditions.items()}
        return Samples(BatchId(self.phase.index, draw, prompts.start, self.updates), x_s, conditions)

    def _roll(
        self, phases: int, draw: int, prompts: PromptBatch, entry: torch.Tensor | None = None, grad: bool = False
    ) -> torch.Tensor:
        """Roll out through the first ``phases`` phases; the one in training is left at its exit step.

        The samples are of the bucket that the whole draw is of.
        """
        training = phases == self.phase.index + 1
        way = [*self.phases[: phases - 1], self.segment(draw)] if training else self.phases[:phases]
        return rollout(
            self.buckets.family(draw),
            self.experts,
            way,
            self._key("rollout", draw),
            prompts.start,
            {name: value.to(self.device) for name, value in prompts.conditions.items()},
            prompts.count,
            solver=self.recipe.method.solver,
            leave=self.exit(draw) if training else None,
            grad=grad,
            entry=entry,
            device=self.device,
        )

    def from_pairs(
        self, batch_id: BatchId, count: int, t: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Noised]:
        """Return the student's x_0 [count, ...] in one call on pairs, the teacher's, and what the call was made on.

        The batches walk all pairs, in a new order each time round.

        Args:
            batch_id: of the micro-batch.
            count: samples of it.
            t: the pairs' noise and x_0 are mixed to x_t at these times [count]; None: the noise alone, where the
                student begins.
        """
        first = batch_id.draw // self.draws * self.recipe.batch.size + batch_id.start
        noise, target, conditions = self.take_pairs("regression", first, count)
        x_t = noise if t is None else self.family.schedule.diffuse(target, noise, t)
        if t is None:
            t = torch.full((count,), self.phase.times[0], dtype=torch.float64, device=self.device)
        prediction = self.experts.expert(self.phase.index)(x_t, t.to(self.device), conditions)
        x0 = self.family.schedule.convert(prediction, x_t, t, self.family.prediction, "x0")
        return x0, target, Noised(batch_id, x_t, t, conditions)

    def take_pairs(self, stream: str, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """Return the noise, the results and the conditions of a stream's next pairs, in an order of its own."""
        assert self.pairs is not None
        if self._pair_order is None:
            self._pair_order = RowOrder(self.recipe.seed, stream, [RowGroup(len(self.pairs), 0)])
        return self.pairs.take(self._pair_order.rows(first, count))

    def regression_samples(self, batch_id: BatchId, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's and the teacher's x_0 [count, ...] from the same noise."""
        x0, target, _ = self.from_pairs(batch_id, count)
        return x0, target

    @cached_property
    def pair_distance(self) -> PairDistance:
        """The distance of each sample to its pair's, of latents [B, ...] each to [B]: ``method.regression.distance``.

        Raises:
            UserError: as `PixelDistance`.
        """
        if self.recipe.method.regression.distance == "l2":
            return regression_loss
        return PixelDistance(self.recipe, self.family).to(self.device)

    def _regression(self, batch_id: BatchId) -> torch.Tensor:
        """The distance of the student's and the teacher's result from the same noise (DMD Sec. 3.3)."""
        count = self.recipe.batch.size // self.recipe.batch.micros
        return self.pair_distance(*self.regression_samples(batch_id, count)).mean()

    def _key(self, stream: str, draw: int) -> Key:
        return Key(self.recipe.seed, self.phase.index, stream, draw)
