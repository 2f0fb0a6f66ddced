"""The controller: the distillation's loop over groups of actors. Only references pass through it."""

import asyncio
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import ray
from ray import ObjectRef

from raydmd.config import Recipe
from raydmd.methods.phase import Phase
from raydmd.runtime.groups import Call, ScorerPool, TrainerGroup
from raydmd.runtime.manifest import Manifest
from raydmd.runtime.recorder import Recorder
from raydmd.runtime.workers import Micro


@dataclass
class Cluster:
    """Every actor of a run, in groups."""

    generators: TrainerGroup
    fakes: TrainerGroup
    scorers: ScorerPool
    prompts: Any
    archivist: Any

    @property
    def sizes(self) -> dict[str, int]:
        """Workers of each role."""
        workers = {"teacher": self.scorers.workers, "fake": self.fakes.workers, "generator": self.generators.workers}
        return {role: len(group) for role, group in workers.items()}

    def close(self) -> None:
        """End every actor, so that it holds nothing of a cluster that others use."""
        for actor in (*self.generators.workers, *self.fakes.workers, *self.scorers.workers, self.prompts):
            ray.kill(actor)
        ray.kill(self.archivist)


@dataclass
class Controller:
    """Runs a distillation to its end, or to ``stop()``.

    The exact overlapped schedule: in iteration n the generator makes every rollout of its version n at once; the
    fake trains on each as it arrives while the teacher scores the generator's proposal; only the fake's own
    scoring waits for its updates. Meanwhile the generator makes what frozen experts contribute to the next
    rollouts. Calls are made in the order of the algorithm and take one another's references, so Ray's data flow
    is the schedule and the result is the sequential reference's, to the bit.

    Args:
        recipe: the run's recipe.
        phases: its phases.
        lengths: iterations of each phase.
        cluster: the actors, formed.
        recorder: where figures go.
        start: manifest from which to continue, if any.
        states: trainers' states that belong to it, by role.
        experts: finished experts' weights that belong to it.
        until: stop once this many iterations are committed.
    """

    recipe: Recipe
    phases: list[Phase]
    lengths: list[int]
    cluster: Cluster
    recorder: Recorder
    start: Manifest | None = None
    states: dict[str, Any] = field(default_factory=dict)
    experts: list[Any] = field(default_factory=list)
    until: int | None = None

    def __post_init__(self) -> None:
        self.ends = list(accumulate(self.lengths))
        self.committed = self.start.iteration if self.start else 0
        self.finished = self.stopping = False
        self._prompts: dict[int, list[ObjectRef]] = {}
        self._rollouts: dict[int, list[Call]] = {}
        self._last: dict[int, list[ObjectRef]] = {}

    async def run(self) -> None:
        """Run every phase that is not done; an error of a worker is raised as it is."""
        self._records: asyncio.Queue[Any] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._record())
                await self._train()
                self._records.put_nowait(None)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _train(self) -> None:
        await self._load_pairs()
        await self._preview_teacher()
        for phase, end in zip(self.phases, self.ends, strict=True):
            if self.committed >= end:
                continue
            if self._halted():  # at the last phase's edge
                return
            self._begin(phase)
            for n in range(self.committed, end):
                await self._iterate(phase, n)
                if self._halted():
                    break
                if n + 1 < end and (n + 1) % self.recipe.checkpoint.every == 0:
                    self._checkpoint(phase.index)
            if self.committed < end:  # stopped
                self._checkpoint(phase.index)
                return
            self._end(phase)
        self.finished = True

    def stop(self) -> None:
        """Commit the iteration under way, write a manifest and return from ``run``."""
        self.stopping = True

    def _halted(self) -> bool:
        return self.stopping or (self.until is not None and self.committed >= self.until)

    async def _iterate(self, phase: Phase, n: int) -> None:
        """One iteration: the algorithm."""
        generators, fakes, scorers = self.cluster.generators, self.cluster.fakes, self.cluster.scorers
        self._roll_out_up_to(min(n + self.recipe.runtime.max_staleness, self._edge(n) - 1))
        rollouts = self._rollouts.pop(n)
        updates = [fakes.consume("update", inputs=[rollout.results]) for rollout in rollouts]
        proposal = generators.produce("propose", n, inputs=self._draw(n, len(rollouts)))
        generated = fakes.produce("score", inputs=proposal.results)
        ahead = self._prepare(phase, n + 1)
        await asyncio.wait([asyncio.wrap_future(receipt.future()) for receipt in proposal.receipts])
        real = await scorers.map("score", [(result,) for result in proposal.results])
        step = generators.consume("update", inputs=[real.results, generated.results])
        calls = [*rollouts, *updates, proposal, generated, *ahead, real, step]
        self._prompts.pop(n)
        if n + 1 < self.ends[-1]:
            self._draw(n + 1, 0)  # ask ahead
        self.committed = n + 1
        self._records.put_nowait((phase.index, n, [receipt for call in calls for receipt in call.receipts]))
        self._preview(phase, n)

    def _roll_out_up_to(self, last: int) -> None:
        """Have the fake's samples made for iterations up to ``last`` that have none, by the generator as it is."""
        for n in range(self.committed, last + 1):
            if n not in self._rollouts:
                updates = range(self.recipe.method.fake_updates)
                rollout = self.cluster.generators.produce
                self._rollouts[n] = [rollout("rollout", n, u, inputs=self._draw(n, u)) for u in updates]

    def _prepare(self, phase: Phase, n: int) -> list[Call]:
        """Have the frozen experts' part of the next rollouts made while the generator waits for its scores."""
        if not phase.index or n >= self.ends[phase.index] or n in self._rollouts:
            return []
        draws = [self._draw(n, u) for u in range(self.recipe.method.fake_updates + 1)]
        return [self.cluster.generators.consume("prepare", n, inputs=draws)]

    def _edge(self, n: int) -> int:
        """Return the next iteration after ``n`` at which rollouts start afresh, so that a resumed run is the same."""
        every, end = self.recipe.checkpoint.every, next(end for end in self.ends if end > n)
        return min(end, (n // every + 1) * every)

    def _draw(self, n: int, draw: int) -> list[ObjectRef]:
        """Return the conditions of draw ``draw`` of iteration ``n``, one reference a micro-batch."""
        micros = self.recipe.batch.micros
        if n not in self._prompts:
            count = micros * (self.recipe.method.fake_updates + 1)
            taken = self.cluster.prompts.take.options(num_returns=count).remote(n)
            self._prompts[n] = taken if isinstance(taken, list) else [taken]
        return self._prompts[n][draw * micros : (draw + 1) * micros]

    def _begin(self, phase: Phase) -> None:
        """Start a phase, or take up the manifest's state in the middle of it."""
        generators, fakes = self.cluster.generators, self.cluster.fakes
        for index, weights in enumerate(self.experts):
            generators.all("load_expert", index, weights)
        self.experts = []
        waits = [*generators.all("start_phase", phase.index, self.committed)]
        waits += fakes.all("start_phase", phase.index, self.committed)
        for role, group in (("generator", generators), ("fake", fakes)):
            if role in self.states:
                waits += group.all("load_state", self.states.pop(role))
        self._watch(waits)
        self.recorder.event("phase", phase=phase.index + 1, iteration=self.committed, end=phase.end)

    def _end(self, phase: Phase) -> None:
        """Fix the expert, keep it beside the run and record that the phase is done."""
        weights = self.cluster.generators.all("end_phase")
        saved = self.cluster.archivist.save_expert.remote(phase.index, weights[0])
        self._watch([*weights[1:], saved])
        self._checkpoint(phase.index + 1)

    def _checkpoint(self, phase: int) -> None:
        """Have the state at this edge written in the background; at a phase's edge the experts are the state."""
        n, updates = self.committed, self.recipe.method.fake_updates
        manifest = Manifest(
            iteration=n,
            phase=phase,
            generator_version=n,
            fake_version=n * updates,
            cursor=n * (updates + 1) * self.recipe.batch.size,
            seed=self.recipe.seed,
            experts=phase,
        )
        roles = {} if n in self.ends else {"generator": self.cluster.generators, "fake": self.cluster.fakes}
        states = [group.one("state") for group in roles.values()]
        written = self.cluster.archivist.save.remote(manifest, list(roles), *states)
        self._records.put_nowait(("checkpoint", n, [written]))

    def _preview(self, phase: Phase, n: int) -> None:
        """Have a grid of samples drawn now and then."""
        every = self.recipe.monitor.samples_every
        if every and ((n + 1) % every == 0 or n + 1 in self.ends):
            count = self.recipe.monitor.samples
            conditions = self.cluster.prompts.rows.remote(0, count)
            self._records.put_nowait(("preview", n, [self.cluster.generators.one("preview", count, conditions)]))

    async def _preview_teacher(self) -> None:
        """Have the teacher draw the pictures that the student's will be held against."""
        if self.recipe.monitor.samples_every and not self.committed:
            count = self.recipe.monitor.samples
            drawn = await self.cluster.scorers.map("preview", [(count, self.cluster.prompts.rows.remote(0, count))])
            self._records.put_nowait(("preview", None, drawn.results))

    async def _load_pairs(self) -> None:
        """Have the teacher make the ODE pairs for DMD's regression."""
        total, chunk = self.recipe.method.regression.pairs, 256
        if not self.recipe.method.regression.weight or self.committed >= self.ends[-1]:
            return
        work = [(start, min(chunk, total - start)) for start in range(0, total, chunk)]
        inputs = [(start, count, self.cluster.prompts.rows.remote(start, count)) for start, count in work]
        pairs = await self.cluster.scorers.map("pairs", inputs)
        self._watch(self.cluster.generators.all("load_pairs", *pairs.results))

    def _watch(self, references: list[ObjectRef]) -> None:
        """Let the recorder wait for calls that return nothing, so that their errors surface."""
        self._records.put_nowait(("wait", self.committed, references))

    async def _record(self) -> None:
        """Write down what ends, in the order in which it was begun."""
        while (record := await self._records.get()) is not None:
            kind, n, references = record
            answers = await asyncio.gather(*references)
            if kind == "checkpoint":
                self.recorder.event(
                    "checkpoint", iteration=n, bytes=sum(f["bytes"] for f in answers[0][0].files.values())
                )
            elif kind == "preview":
                self.recorder.pictures("teacher" if n is None else f"student-{n + 1:06d}", answers[0])
            elif kind != "wait":
                self.recorder.iteration(kind, n, answers, self.cluster.sizes)


def micro_batches(recipe: Recipe) -> list[Micro]:
    """Cut the global batch as the recipe says."""
    size = recipe.batch.micro or recipe.batch.size
    return [Micro(index, index * size, size) for index in range(recipe.batch.micros)]
