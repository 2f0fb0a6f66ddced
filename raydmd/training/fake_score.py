"""The fake score's part of an iteration: score matching on the generator's samples, and scoring its proposal."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.models.base import Denoiser, Family
from raydmd.objectives.score_matching import score_matching_loss
from raydmd.sampling.phase import Phase
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import Noised, Samples, Score, UpdateStats
from raydmd.training.trainable_state import FlatParameters


class Fake:
    """Tracks the score of the generator's distribution at x_t, t > s; re-made from the teacher each phase.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: its weights, from which it is made anew each phase.
        phases: the run's phases.
        device: where it computes.
    """

    role = "fake"
    figures: tuple[str, ...] = ("loss_fake",)

    def __init__(
        self, recipe: Recipe, family: Family, teacher: Denoiser, phases: Sequence[Phase],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        self.phases = list(phases)
        self.teacher = teacher
        self.updates = 0

    def start_phase(self, index: int, updates: int) -> None:
        """Re-make the fake score from the teacher's weights (Phased DMD Sec. 2.3.1), with a new optimizer.

        Args:
            index: of the phase.
            updates: made so far, over all phases.
        """
        self.phase, self.updates = self.phases[index], updates
        self.network = copy.deepcopy(self.teacher).to(self.device).requires_grad_(True)
        self.flat = FlatParameters(dict(self.network.named_parameters()), self.recipe.optimizer.of(self.role))

    def update(self, batches: list[Samples], collective: Collective | None = None) -> UpdateStats:
        """Train on this replica's micro-batches of x_s (Phased DMD Eq. 13), and step with the others'.

        Raises:
            FloatingPointError: the gradient is not finite; the message names the role whose fault it is.
        """
        method, schedule, gradients, micro = self.recipe.method, self.family.schedule, [], []
        with self.flat.attempt():
            for number, samples in enumerate(batches, start=1):
                batch_id, x_s = samples.batch_id, samples.x_s.to(self.device)
                count = x_s.shape[0]
                t = self.phase.score_times(method, uniform(self._key("fake-t", batch_id.draw), batch_id.start, count))
                noise = normal(self._key("fake-noise", batch_id.draw), batch_id.start, count, self.family.latent_shape)
                noise = noise.to(self.device)
                x_t = schedule.diffuse(x_s, noise, t, self.phase.end)
                conditions = {name: value.to(self.device) for name, value in samples.conditions.items()}
                output = self.network(x_t, t.to(self.device), conditions)
                loss = score_matching_loss(
                    schedule,
                    output,
                    x_s,
                    noise,
                    t,
                    self.phase.end,
                    self.family.prediction,
                    clamp=method.clamp,
                    target=method.fake_target,
                )
                (loss.sum() / self.recipe.batch.size).backward()
                gradients.append(self.flat.take_gradient(last=number == len(batches)))
                micro.append((batch_id.start, {self.figures[0]: float(loss.detach().mean())}))
            try:
                norm = self.flat.step(gradients, self.recipe.batch.micros, collective or Alone())
            except FloatingPointError as error:
                broken = sum(int((~samples.x_s.isfinite()).flatten(1).any(1).sum()) for samples in batches)
                if broken:
                    raise FloatingPointError(f"{error}: the generator made {broken} samples that are not") from error
                if not all(math.isfinite(value) for _, row in micro for value in row.values()):
                    raise FloatingPointError(f"{error}: nor is the fake score's loss, on samples that are") from error
                raise  # another replica's, or too large a sum
        self.updates += 1
        return UpdateStats(norm, micro, self.updates)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that the next update depends on."""
        return self.flat.state()

    @torch.no_grad()
    def score(self, proposal: Noised) -> Score:
        """Predict on the generator's proposal, without guidance."""
        batch_id = proposal.batch_id
        conditions = {name: value.to(self.device) for name, value in proposal.conditions.items()}
        prediction = self.network(proposal.x_t.to(self.device), proposal.t.to(self.device), conditions)
        return Score(replace(batch_id, fake_version=self.updates), prediction)

    def _key(self, stream: str, draw: int) -> Key:
        return Key(self.recipe.seed, self.phase.index, stream, draw)
