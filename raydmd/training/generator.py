"""The generator's part of an iteration: rollouts, a proposal to be scored, the distribution-matching update."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.row_order import RowGroup, RowOrder
from raydmd.data.trajectories import Pairs
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.models.experts import Experts
from raydmd.objectives.distribution_matching import distribution_matching_gradient, surrogate_loss
from raydmd.objectives.regression import regression_loss
from raydmd.sampling.plan import plan_phases
from raydmd.sampling.student import exit_step, rollout
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import BatchId, Noised, Samples, Score
from raydmd.training.trainable_state import FlatParameters
from raydmd.training.zeroed import by_role


@dataclass(frozen=True)
class GeneratorStats:
    """Figures of one update.

    Attributes:
        norm: the gradient's, before clipping.
        micro: per micro-batch (start, mean of |g|, x_s mean, x_s std).
        version: updates made with it.
        zeroed: samples of this replica's that were left out, their gradient not being finite, by the role that made
            them.
    """

    norm: float
    micro: list[tuple[int, float, float, float]]
    version: int
    zeroed: dict[str, int] = field(default_factory=dict)


class Generator:
    """Trains one expert a phase; earlier experts are frozen.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: its weights, from which every expert starts.
        device: where it computes.
    """

    def __init__(self, recipe: Recipe, family: Family, teacher: Denoiser, device: torch.device | str = "cpu") -> None:
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        self.phases = plan_phases(recipe, family.schedule.t_max)
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

    def start_phase(self, index: int, iteration: int) -> None:
        """Make expert ``index`` from the teacher and begin to train it at ``iteration``, with a new optimizer."""
        self.phase, self.updates, self.ended = self.phases[index], iteration, False
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

    def prepare(self, iteration: int, update: int, start: int, count: int, conditions: Conditions) -> None:
        """Make ahead what the frozen experts contribute to a rollout: it depends on no version of the weights."""
        if self.phase.index:
            draw = iteration * self.draws + update
            self._entries[draw, start] = self._roll(self.phase.index, draw, start, count, conditions)

    def rollout(self, iteration: int, update: int, start: int, count: int, conditions: Conditions) -> Samples:
        """Make the samples [count, ...] of fake update ``update``, without gradient."""
        return self._samples(iteration, update, start, count, conditions, grad=False)

    def propose(self, iteration: int, start: int, count: int, conditions: Conditions) -> Noised:
        """Make the generator's own samples, keep their graph, and noise them for scoring (Phased DMD Eq. 11)."""
        samples = self._samples(iteration, self.draws - 1, start, count, conditions, grad=True)
        method, schedule = self.recipe.method, self.family.schedule
        u = uniform(self._key("score-t", samples.batch_id.draw), start, count)
        t = self.phase.score_times(method, u)
        noise = normal(self._key("score-noise", samples.batch_id.draw), start, count, self.family.latent_shape)
        x_t = schedule.diffuse(samples.x_s.detach(), noise.to(self.device), t, self.phase.end)
        proposal = Noised(samples.batch_id, x_t, t, samples.conditions)
        self._kept[start] = samples.x_s, proposal
        return proposal

    def update(self, teacher: list[Score], fake: list[Score], collective: Collective | None = None) -> GeneratorStats:
        """Apply the distribution-matching gradient to this replica's proposals, and step with the others'."""
        method, gradients, figures, zeroed = self.recipe.method, [], [], Counter[str]()
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
                figures.append((proposal.batch_id.start, float(gradient.abs().mean()), mean, spread))
            try:
                norm = self.flat.step(gradients, self.recipe.batch.micros, collective or Alone())
            except FloatingPointError as error:
                if not all(math.isfinite(mean) for _, _, mean, _ in figures):
                    raise FloatingPointError(f"{error}: nor are the generator's own samples") from error
                raise
        self.updates += 1
        self._kept.clear()  # of calls that were dropped and made again by another replica
        self._entries = {key: x for key, x in self._entries.items() if key[0] >= self.updates * self.draws}
        return GeneratorStats(norm, figures, self.updates, dict(zeroed))

    def _samples(
        self, iteration: int, update: int, start: int, count: int, conditions: Conditions, grad: bool
    ) -> Samples:
        draw = iteration * self.draws + update
        entry = self._entries.pop((draw, start), None)
        x_s = self._roll(self.phase.index + 1, draw, start, count, conditions, entry, grad)
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        return Samples(BatchId(self.phase.index, draw, start, self.updates), x_s, conditions)

    def _roll(
        self,
        phases: int,
        draw: int,
        start: int,
        count: int,
        conditions: Conditions,
        entry: torch.Tensor | None = None,
        grad: bool = False,
    ) -> torch.Tensor:
        """Roll out through the first ``phases`` phases; the one in training is left at its exit step."""
        training = phases == self.phase.index + 1
        return rollout(
            self.family,
            self.experts,
            self.phases[:phases],
            self._key("rollout", draw),
            start,
            {name: value.to(self.device) for name, value in conditions.items()},
            count,
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
