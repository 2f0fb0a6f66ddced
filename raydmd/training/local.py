"""The sequential reference: the whole distillation in one process, to be read beside the paper.

The Ray runtime runs the same parts (`Generator`, `Fake`, `Scorer`) in actors and must end at the same weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.data.row_order import PromptOrder
from raydmd.data.trajectories import Pairs
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.models.encoding import encode_rows
from raydmd.sampling.plan import plan_iterations
from raydmd.training.fake_score import Fake, FakeStats
from raydmd.training.generator import Generator, GeneratorStats
from raydmd.training.teacher import Scorer
from raydmd.training.zeroed import refuse_too_many


@dataclass
class Reference:
    """What the reference trainer ends with: the parts, and every expert's averaged weights by name."""

    generator: Generator
    fake: Fake
    scorer: Scorer
    experts: list[dict[str, torch.Tensor]] = field(default_factory=list)


def train(
    recipe: Recipe,
    family: Family,
    teacher: Denoiser,
    prompts: PromptTable,
    on_iteration: Callable[[int, list[FakeStats], GeneratorStats], None] | None = None,
    iterations: int | None = None,
) -> Reference:
    """Distil ``teacher`` by the recipe's method, sequentially.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: the many-step teacher.
        prompts: what the samples are conditioned on, in the order of `PromptOrder`.
        on_iteration: called with (iteration, the fake's figures, the generator's) after each iteration.
        iterations: stop after this many, without ending the phase; default: all.

    Raises:
        UserError: a row of the prompts that cannot be used.
        RunError: too many samples without a finite gradient.
    """
    generator, fake = Generator(recipe, family, teacher), Fake(recipe, family, teacher)
    run = Reference(generator, fake, Scorer(recipe, family, teacher))
    size, micro, updates = recipe.batch.size, recipe.batch.micro or recipe.batch.size, recipe.method.fake_updates
    starts, order = range(0, size, micro), PromptOrder(recipe, prompts.groups)

    def conditions(iteration: int, update: int, start: int) -> Conditions:
        return encode_rows(family, prompts, order.draw(iteration, update, start, micro))

    if recipe.method.regression.weight:
        generator.pairs = make_pairs(recipe, family, run.scorer, prompts)
    iteration = 0
    for index, length in enumerate(plan_iterations(recipe, generator.phases)):
        generator.start_phase(index, iteration)
        fake.start_phase(index, iteration)
        for _ in range(length):
            if iteration == iterations:
                return run
            losses = []
            for u in range(updates):
                batches = [generator.rollout(iteration, u, s, micro, conditions(iteration, u, s)) for s in starts]
                losses.append(fake.update(batches))
            proposals = [generator.propose(iteration, s, micro, conditions(iteration, updates, s)) for s in starts]
            real = [run.scorer.score(proposal) for proposal in proposals]
            generated = [fake.score(proposal) for proposal in proposals]
            figures = generator.update(real, generated)
            refuse_too_many(recipe, iteration, figures.zeroed)
            if on_iteration is not None:
                on_iteration(iteration, losses, figures)
            iteration += 1
        run.experts.append(generator.end_phase())
    return run


def make_pairs(recipe: Recipe, family: Family, scorer: Scorer, prompts: PromptTable, chunk: int = 256) -> Pairs:
    """Let the teacher make the recipe's ODE pairs; their prompts walk all rows, in an order of their own."""
    total, made, order = recipe.method.regression.pairs, [], PromptOrder(recipe, prompts.groups)
    for start in range(0, total, chunk):
        conditions = encode_rows(family, prompts, order.pairs(start, min(chunk, total - start)))
        made.append(scorer.pairs(start, min(chunk, total - start), conditions))
    return Pairs.join(made)
