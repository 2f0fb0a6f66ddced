"""The fake score's part of an iteration: score matching on the generator's samples, and scoring its proposal."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.objectives.score_matching import score_matching_loss
from raydmd.sampling.phase import Phase
from raydmd.training.collective import Alone, Collective
from raydmd.training.messages import BatchId, Samples, UpdateStats
from raydmd.training.score_network import ScoreNetwork
from raydmd.training.trainable_state import FlatParameters


class Fake(ScoreNetwork):
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
        teacher = self.teacher.for_interval(self.phase.score_high, self.phase.score_low)
        self.network = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        self.flat = FlatParameters(dict(self.network.named_parameters()), self.recipe.optimizer.of(self.role))

    def update(self, *inputs: list[Any], collective: Collective | None = None) -> UpdateStats:
        """Train on this replica's micro-batches of x_s (Phased DMD Eq. 13), and step with the others'.

        Args:
            inputs: what `losses` takes, a list for each, of one entry a micro-batch; the samples come first.
            collective: the peers.

        Raises:
            FloatingPointError: the gradient is not finite; the message names the role whose fault it is.
        """
        gradients, micro = [], []
        with self.flat.attempt():
            for number, (samples, *more) in enumerate(zip(*inputs, strict=True), start=1):
                loss, row = self.losses(samples, *more)
                (loss.sum() / self.recipe.batch.size).backward()
                gradients.append(self.flat.take_gradient(last=number == len(inputs[0])))
                micro.append((samples.batch_id.start, row))
            try:
                norm = self.flat.step(gradients, self.recipe.batch.micros, collective or Alone())
            except FloatingPointError as error:
                broken = sum(int((~samples.x_s.isfinite()).flatten(1).any(1).sum()) for samples in inputs[0])
                if broken:
                    raise FloatingPointError(f"{error}: the generator made {broken} samples that are not") from error
                if not all(math.isfinite(value) for _, row in micro for value in row.values()):
                    raise FloatingPointError(f"{error}: nor is the fake score's loss, on samples that are") from error
                raise  # another replica's, or too large a sum
        self.updates += 1
        return UpdateStats(norm, micro, self.updates, lr=self.flat.lr)

    def losses(self, samples: Samples) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of each sample, [B], and the micro-batch's figures."""
        x_s, noise, t, x_t = self.noised(samples)
        output = self.predict(x_t, t.to(self.device), self.on_device(samples.conditions))
        loss = self.matching_loss(samples, output, x_s, noise, t)
        return loss, {self.figures[0]: float(loss.detach().mean())}

    def noised(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the samples, and their noise, times and x_t."""
        batch_id, x_s = samples.batch_id, samples.x_s.to(self.device)
        phase, count = self.segment(batch_id.draw), x_s.shape[0]
        u = uniform(self._key("fake-t", batch_id.draw), batch_id.start, count)
        t = phase.score_times(self.recipe.method, u)
        noise = normal(self._key("fake-noise", batch_id.draw), batch_id.start, count, tuple(x_s.shape[1:]))
        noise = noise.to(self.device)
        return x_s, noise, t, self.family.schedule.diffuse(x_s, noise, t, phase.end)

    def matching_loss(
        self, samples: Samples, output: torch.Tensor, x_s: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Return the score matching loss of each sample, [B] (Phased DMD Eq. 13)."""
        method = self.recipe.method
        return score_matching_loss(
            self.family.schedule,
            output,
            x_s,
            noise,
            t,
            self.segment(samples.batch_id.draw).end,
            self.family.prediction,
            clamp=method.clamp,
            target=method.fake_target,
        )

    def on_device(self, conditions: Conditions) -> Conditions:
        """Return conditions on this part's device."""
        return {name: value.to(self.device) for name, value in conditions.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that the next update depends on."""
        return self.flat.state()

    def segment(self, draw: int) -> Phase:
        """Return where a draw's samples end, and which t they are noised to; by default, the phase in training."""
        return self.phase

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return the network's prediction, without guidance."""
        return self.network(x_t, t, conditions)

    def with_version(self, batch_id: BatchId) -> BatchId:
        """Say after how many updates."""
        return replace(batch_id, fake_version=self.updates)

    def _key(self, stream: str, draw: int) -> Key:
        return Key(self.recipe.seed, self.phase.index, stream, draw)
