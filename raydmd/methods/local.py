"""The local executor: the whole distillation in one process, sequentially; the reference for every other.

The Ray executor calls the same parts in actors and must end at the same weights.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.data.row_order import PromptOrder
from raydmd.data.trajectories import PAIR_CHUNK, Pairs
from raydmd.methods.base import Method
from raydmd.methods.pairs import check_run_pairs, folder_pairs
from raydmd.methods.program import plan_updates
from raydmd.methods.registry import build_method
from raydmd.models.base import Denoiser, Family
from raydmd.models.buckets import Buckets
from raydmd.models.encoding import encode_rows
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations
from raydmd.training.collective import Alone
from raydmd.training.messages import MicroBatch, PromptBatch, UpdateStats, micro_batches
from raydmd.training.teacher import Scorer
from raydmd.training.zeroed import refuse_too_many

Figures = dict[str, list[UpdateStats]]  # of an iteration's updates, by role


@dataclass
class Reference:
    """What the local executor ends with: the parts by role, and every expert's averaged weights by name."""

    parts: dict[str, Any]
    experts: list[dict[str, torch.Tensor]] = field(default_factory=list)


class LocalProgram:
    """What a method's code is given: calls that return a list, one result a micro-batch, at once.

    Args:
        method: the method.
        family: the kind of network.
        teacher: the many-step teacher.
        prompts: what the samples are conditioned on.
    """

    def __init__(self, method: Method, family: Family, teacher: Denoiser, prompts: PromptTable) -> None:
        recipe = method.recipe
        self.method, self.family, self.table = method, family, prompts
        self.phases = method.phases(family.schedule.t_max)
        self.lengths = plan_iterations(recipe, self.phases)
        self.micros: list[MicroBatch] = micro_batches(recipe)
        self.order = PromptOrder(recipe, prompts.groups, method.draws)
        self.buckets = Buckets(recipe, family)
        self.parts = {
            name: role.part(recipe, family, teacher, self.phases) for name, role in method.roles.items()
        }  # fmt: skip
        self.figures: Figures = {}

    def prompts(self, n: int, draw: int) -> list[PromptBatch]:
        """Return the prompts of a draw."""
        sized = self.buckets.family_of(n, draw)
        rows = [self.order.draw(n, draw, m.start, m.count) for m in self.micros]
        conditions = [sized.for_size(encode_rows(self.family, self.table, each)) for each in rows]
        return [PromptBatch(m.start, m.count, each) for m, each in zip(self.micros, conditions, strict=True)]

    def phase(self, n: int) -> Phase:
        """Return the phase of an iteration."""
        ends = [sum(self.lengths[: k + 1]) for k in range(len(self.lengths))]
        return self.phases[bisect_right(ends, n)]

    def __getattr__(self, role: str) -> "LocalCalls":
        if role == "parts" or role not in self.parts:
            raise AttributeError(role)
        return LocalCalls(self, role)


@dataclass(frozen=True)
class LocalCalls:
    """The calls on one role."""

    program: LocalProgram
    role: str

    def __getattr__(self, name: str) -> Callable[..., Any]:
        part = self.program.parts[self.role]

        def update(*inputs: list[Any]) -> None:
            self.program.figures.setdefault(self.role, []).append(part.update(*inputs, collective=Alone()))

        def call(*values: Any) -> list[Any]:
            arguments = tuple(value for value in values if not isinstance(value, list))
            inputs = values[len(arguments) :]
            return [getattr(part, name)(*arguments, *each) for each in zip(*inputs, strict=True)]

        return update if name == "update" else call


def train(
    recipe: Recipe,
    family: Family,
    teacher: Denoiser,
    prompts: PromptTable,
    on_iteration: Callable[[int, Figures], None] | None = None,
    iterations: int | None = None,
) -> Reference:
    """Distil ``teacher`` by the recipe's method, sequentially.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: the many-step teacher.
        prompts: what the samples are conditioned on, in the order of `PromptOrder`.
        on_iteration: called with (iteration, its updates' figures by role) after each iteration.
        iterations: stop after this many, without ending the phase; default: all.

    Raises:
        UserError: a row of the prompts that cannot be used; ``pairs.path`` has not what the run would make itself.
        RunError: too many samples without a finite gradient.
    """
    method = build_method(recipe)
    program = LocalProgram(method, family, teacher, prompts)
    run, student = Reference(program.parts), program.parts[method.student]
    if recipe.pairs.path is not None:
        check_run_pairs(recipe, family, prompts)
        student.pairs = folder_pairs(recipe, student.device)
    elif method.pairs:
        student.pairs = make_pairs(method, family, program.parts[method.teacher], prompts, method.pairs)
    updates, iteration = dict.fromkeys(method.trained(), 0), 0
    for index, length in enumerate(program.lengths):
        for role, made in updates.items():
            program.parts[role].start_phase(index, made)
            plan_updates(program.parts[role], recipe, role, index, family.schedule.t_max)
        for _ in range(length):
            if iteration == iterations:
                return run
            program.figures = {}
            method.iteration(program, iteration, method.rollouts(program, iteration))
            zeroed = Counter[str]()
            for role, figures in program.figures.items():
                updates[role] += len(figures)
                for stats in figures:
                    zeroed.update(stats.zeroed)
            refuse_too_many(recipe, iteration, zeroed)
            if on_iteration is not None:
                on_iteration(iteration, program.figures)
            iteration += 1
        run.experts.append(student.end_phase())
    return run


def make_pairs(
    method: Method, family: Family, scorer: Scorer, prompts: PromptTable, total: int, chunk: int = PAIR_CHUNK,
    first: int = 0,
) -> Pairs:  # fmt: skip
    """Let the teacher make ODE pairs; their prompts walk all rows, in an order of their own.

    Args:
        method: whose pairs they are.
        family: the kind of network.
        scorer: the teacher.
        prompts: what the pairs are conditioned on.
        total: how many.
        chunk: pairs that are computed at once.
        first: number of the first; of a chunk's, where the bits are to be those of pairs that are made from 0 on.
    """
    made, order = [], PromptOrder(method.recipe, prompts.groups, method.draws)
    for start in range(first, first + total, chunk):
        count = min(chunk, first + total - start)
        made.append(scorer.pairs(start, count, encode_rows(family, prompts, order.pairs(start, count))))
    return Pairs.join(made)
