"""Training an embedded teacher by denoising score matching on clean data (Phased DMD Eq. 4), with label dropout."""

import copy
import math

import torch

from raydmd.config.recipe import Optimizer, Recipe
from raydmd.data.embedded import clean_batch
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.diffusion.times import sample_times
from raydmd.models.base import Denoiser, EmbeddedFamily
from raydmd.objectives.score_matching import score_matching_loss
from raydmd.training.collective import Collective
from raydmd.training.trainable_state import FlatParameters


class Pretraining:
    """One replica of a teacher in training; replicas share out each batch's micro-batches.

    Args:
        recipe: its ``pretrain`` section gives the numbers, its seed the weights and the noise.
        family: an embedded family.
    """

    def __init__(self, recipe: Recipe, family: EmbeddedFamily) -> None:
        self.recipe, self.family, self.settings = recipe, family, recipe.pretrain
        self.network = family.new_network(recipe.seed)
        optimizer = Optimizer(lr=self.settings.lr, betas=(0.9, 0.999), clip=1.0)
        self.flat = FlatParameters(dict(self.network.named_parameters()), optimizer, self.settings.ema, unbiased=True)

    def step(self, iteration: int, rank: int, world: int, collective: Collective) -> float:
        """Make one update with this replica's share of the batch; return its mean loss."""
        settings, gradients, losses = self.settings, [], []
        starts = range(0, settings.batch, settings.micro or settings.batch)
        share = [start for number, start in enumerate(starts) if number % world == rank]
        for start in share:
            loss = self._loss(iteration, start, settings.micro or settings.batch)
            (loss.sum() / settings.batch).backward()
            gradients.append(self.flat.take_gradient(last=start == share[-1]))
            losses.append(float(loss.detach().mean()))
        self.flat.step(gradients, len(starts), collective, self._lr(iteration))
        return sum(losses) / len(losses) if losses else math.nan

    def teacher(self) -> Denoiser:
        """Return a copy of the network with its averaged weights, frozen."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(self.flat.averaged()[name])
        return network.requires_grad_(False).eval()

    def _loss(self, iteration: int, start: int, count: int) -> torch.Tensor:
        schedule, family = self.family.schedule, self.family
        x_0, rows = clean_batch(family.name, self._key("data", iteration), start, count)
        conditions = family.conditions(rows)
        if conditions:
            drop = uniform(self._key("drop", iteration), start, count) < self.settings.label_dropout
            empty = family.unconditional(conditions)
            conditions = {
                name: torch.where(drop.view(-1, *[1] * (value.dim() - 1)), empty[name], value)
                for name, value in conditions.items()
            }
        u = uniform(self._key("t", iteration), start, count)
        t = sample_times(u, 0.0, schedule.t_max, margin=1e-3 * schedule.t_max, t_max=schedule.t_max)
        noise = normal(self._key("noise", iteration), start, count, family.latent_shape)
        output = self.network(schedule.diffuse(x_0, noise, t), t, conditions)
        return score_matching_loss(schedule, output, x_0, noise, t, 0.0, family.prediction)

    def _lr(self, iteration: int) -> float:
        """Warm up linearly, then fall by a cosine to a hundredth."""
        settings = self.settings
        warm = min(1.0, (iteration + 1) / max(settings.warmup, 1))
        return settings.lr * warm * (0.505 + 0.495 * math.cos(math.pi * iteration / settings.iterations))

    def _key(self, stream: str, iteration: int) -> Key:
        return Key(self.recipe.seed, 0, f"pretrain-{stream}", iteration)
