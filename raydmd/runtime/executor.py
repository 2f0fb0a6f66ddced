"""Runs a method's iterations over groups of actors: calls are made in the program's order and take references."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from ray import ObjectRef

from raydmd.config.recipe import Recipe
from raydmd.methods.program import CallNode, MethodTrace, Node, PromptsNode, Trace
from raydmd.runtime.actors import RunActors
from raydmd.runtime.workers.trainer_group import Call
from raydmd.training.messages import micro_batches


class RayExecutor:
    """The exact overlapped schedule of any method.

    Trained roles' calls are sent in the order of the program, before the results that they take are there: that order
    on each worker, and the references, are the schedule. A frozen role's are sent when an update needs them, once
    their inputs are there, for any of its workers may take them. While those are waited for, what can be prepared for
    the next iteration is made.

    Every call is named by the update that it is for. When a worker is lost, what was under way is dropped, and the
    iteration is run again: updates that are made are left out, and so is what only they needed.

    Args:
        recipe: the run's recipe.
        trace: what its method does.
        actors: the run's actors.
        note: given every call that is sent, with its iteration.
        answered: called when the frozen roles have answered for an iteration, with its number.
    """

    def __init__(
        self, recipe: Recipe, trace: MethodTrace, actors: RunActors, note: Callable[[int, Call], None],
        answered: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.recipe, self.trace, self.actors, self.note, self.answered = recipe, trace, actors, note, answered
        self.micros = micro_batches(recipe)
        self.forget({})

    def forget(self, updates: dict[str, int]) -> None:
        """Have nothing under way.

        Args:
            updates: made, by trained role.
        """
        self.updates = dict(updates)
        self._traces: dict[int, Trace] = {}
        self._made: dict[Node, list[ObjectRef]] = {}
        self._waits: dict[CallNode, list[ObjectRef]] = {}
        self._prompts: dict[int, list[ObjectRef]] = {}
        self._prepared = -1

    async def run(self, n: int) -> None:
        """Send all that iteration ``n`` still needs; returns when the frozen roles have answered."""
        last = min(n + self.recipe.runtime.max_staleness, self._edge(n) - 1)
        for early in range(n, last + 1):
            self._send_early(early)
        for call in self._traced(n).needed(self.updates):
            if call not in self._made and call.role in self.actors.groups:
                await self._ask_frozen(n, call)
                self._send(n, call)
        self.answered(n)
        for call in self._traces.pop(n).calls:
            self._made.pop(call, None)
            self._waits.pop(call, None)
        self._prompts.pop(n, None)
        if n + 1 < self.trace.ends[-1]:
            self._prompts_of(PromptsNode(n + 1, 0))  # ask ahead

    def _traced(self, n: int) -> Trace:
        if n not in self._traces:
            self._traces[n] = self.trace.iteration(n)
        return self._traces[n]

    def _send_early(self, n: int) -> None:
        """Send an iteration's rollouts, by the weights as they are, unless that is done."""
        if n not in self._traces:
            for call in self._traced(n).needed(self.updates):
                if call.early:
                    self._send(n, call)

    async def _ask_frozen(self, n: int, call: CallNode) -> None:
        """Have frozen roles answer what a call takes of them."""
        asked = [node for node in call.inputs if isinstance(node, CallNode) and node not in self._made]
        if asked:
            self._prepare(n + 1)
            await asyncio.gather(*(self._map(n, node) for node in asked))

    async def _map(self, n: int, call: CallNode) -> None:
        """Give a frozen role's micro-batches to its pool, once what they take is there."""
        await self._ask_frozen(n, call)
        await asyncio.gather(*(ref for node in call.inputs if isinstance(node, CallNode) for ref in self._waits[node]))
        inputs = zip(self.micros, *(self._results(node) for node in call.inputs), strict=True)
        jobs = [(micro, *call.arguments, *each) for micro, *each in inputs]
        sent = await self.actors.pools[call.role].map(call.name, jobs)
        self._made[call], self._waits[call] = sent.results, []
        self.note(n, sent)

    def _send(self, n: int, call: CallNode) -> None:
        """Send a trained role's call."""
        group, inputs = self.actors.groups[call.role], [self._results(node) for node in call.inputs]
        if call.commits:
            self.note(n, group.update(call.at, inputs))
            self.updates[call.role] = call.at + 1
            return
        at = max(call.at, self.updates[call.role])  # beyond only where it has trained on stale rollouts before a loss
        ahead = self.recipe.runtime.max_staleness if call.early else 0
        sent = group.produce(call.name, at, ahead, call.arguments, inputs)
        self._made[call], self._waits[call] = sent.results, sent.call_stats
        self.note(n, sent)

    def _prepare(self, n: int) -> None:
        """Send what can be prepared for an iteration of the same phase whose rollouts are not made yet."""
        if n == self._prepared or n in self.trace.ends or n in self._traces:
            return
        self._prepared = n
        for call in self.trace.preparation(n).calls:
            group, inputs = self.actors.groups[call.role], [self._results(node) for node in call.inputs]
            self.note(n, group.prepare(call.name, self.updates[call.role], call.arguments, inputs))

    def _results(self, node: Node) -> list[ObjectRef]:
        """Return a reference for each micro-batch."""
        return self._prompts_of(node) if isinstance(node, PromptsNode) else self._made[node]

    def _prompts_of(self, node: PromptsNode) -> list[ObjectRef]:
        micros = self.recipe.batch.micros
        if node.iteration not in self._prompts:
            count = micros * len(self.trace.method.draws)
            taken: Any = self.actors.prompts.take.options(num_returns=count).remote(node.iteration)
            self._prompts[node.iteration] = taken if isinstance(taken, list) else [taken]
        return self._prompts[node.iteration][node.draw * micros : (node.draw + 1) * micros]

    def _edge(self, n: int) -> int:
        """Return the next iteration after ``n`` at which rollouts start afresh, so that a resumed run is the same."""
        every, end = self.recipe.checkpoint.every, self.trace.ends[bisect_right(self.trace.ends, n)]
        return min(end, (n // every + 1) * every)
