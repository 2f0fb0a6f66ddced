"""The fake score's part of an iteration: score matching on the generator's samples, and scoring its proposal."""

import copy
import math
from dataclasses import dataclass, replace

import torch

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.models.base import Denoiser, Family
from raydmd.objectives.score_matching import score_matching_loss
from raydmd.sampling.plan import plan_phases
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import Noised, Samples, Score
from raydmd.training.trainable_state import FlatParameters


@dataclass(frozen=True)
class FakeStats:
    """Figures of one update: the gradient's norm and per micro-batch (start, loss)."""

    norm: float
    losses: list[tuple[int, float]]
    version: int


class Fake:
    """Tracks the score of the generator's distribution at x_t, t > s; re-made from the teacher each phase."""

    def __init__(self, recipe: Recipe, family: Family, teacher: Denoiser, device: torch.device | str = "cpu") -> None:
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        self.phases = plan_phases(recipe, family.schedule.t_max)
        self.teacher = teacher
        self.updates = 0

    def start_phase(self, index: int, iteration: int) -> None:
        """Re-make the fake score from the teacher's weights (Phased DMD Sec. 2.3.1), with a new optimizer."""
        self.phase, self.updates = self.phases[index], iteration * self.recipe.method.fake_updates
        self.network = copy.deepcopy(self.teacher).to(self.device).requires_grad_(True)
        self.flat = FlatParameters(dict(self.network.named_parameters()), self.recipe.optimizer.fake)

    def update(self, batches: list[Samples], collective: Collective | None = None) -> FakeStats:
        """Train on this replica's micro-batches of x_s (Phased DMD Eq. 13), and step with the others'.

        Raises:
            FloatingPointError: the gradient is not finite; the message names the role whose fault it is.
        """
        method, schedule, gradients, losses = self.recipe.method, self.family.schedule, [], []
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
                losses.append((batch_id.start, float(loss.detach().mean())))
            try:
                norm = self.flat.step(gradients, self.recipe.batch.micros, collective or Alone())
            except FloatingPointError as error:
                broken = sum(int((~samples.x_s.isfinite()).flatten(1).any(1).sum()) for samples in batches)
                if broken:
                    raise FloatingPointError(f"{error}: the generator made {broken} samples that are not") from error
                if not all(math.isfinite(loss) for _, loss in losses):
                    raise FloatingPointError(f"{error}: nor is the fake score's loss, on samples that are") from error
                raise  # another replica's, or too large a sum
        self.updates += 1
        return FakeStats(norm, losses, self.updates)

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
