"""The controller: the distillation's loop over groups of actors. Only references pass through it."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError

from raydmd.config.recipe import Recipe
from raydmd.errors import RunError, StorageError
from raydmd.locations import KEY
from raydmd.runtime.actors import RunActors
from raydmd.runtime.checkpoint.manager import Manifest
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import Stopped
from raydmd.runtime.recovery.health import HealthMonitor
from raydmd.runtime.recovery.manager import RecoveryManager
from raydmd.runtime.recovery.state import State
from raydmd.runtime.workers.base import CallStats, MicroBatch, TrainerProgress
from raydmd.runtime.workers.process_group import StepDropped
from raydmd.runtime.workers.trainer_group import Call
from raydmd.sampling.phase import Phase
from raydmd.training.zeroed import refuse_too_many


@dataclass
class Controller:
    """Runs a distillation to its end, or to ``stop()``.

    The exact overlapped schedule: in iteration n the generator makes every rollout of its version n at once; the
    fake trains on each as it arrives while the teacher scores the generator's proposal; only the fake's own
    scoring waits for its updates. Meanwhile the generator makes what frozen experts contribute to the next
    rollouts. Calls are made in the order of the algorithm and take one another's references, so Ray's data flow
    is the schedule and the result is the sequential reference's, to the bit.

    Every call is named by the update that it is for. When a worker is lost, what was under way is dropped, the
    survivors say how far they are, and the loop goes on from there: the same calls give the same bits.

    Args:
        recipe: the run's recipe.
        phases: its phases.
        lengths: iterations of each phase.
        actors: the run's actors.
        recorder: where figures go.
        until: stop once this many iterations are committed.
        began: time.perf_counter() when the run began.
        teacher: the teacher's fingerprint.
    """

    recipe: Recipe
    phases: list[Phase]
    lengths: list[int]
    actors: RunActors
    recorder: Recorder
    until: int | None = None
    began: float = field(default_factory=time.perf_counter)
    teacher: str = ""

    def __post_init__(self) -> None:
        self.ends = list(accumulate(self.lengths))
        self.next = self.committed = self.experts = self._fake_updates = 0
        self._announced = -1  # the phase of the last event
        self._started = False
        self.finished = self.stopping = self._paired = self._previewed = False
        self.recovery = RecoveryManager(self.recipe, self.actors, self.recorder, lambda: self.stopping)
        self._background: set[asyncio.Task[None]] = set()
        self.checkpoints = self.recovery.checkpoints
        self._call_stats: dict[int, list[ObjectRef]] = {}
        self._forget_the_dropped()

    async def run(self) -> None:
        """Run every phase that is not done.

        Raises:
            ray.exceptions.RayError: a worker failed again and again.
            RunError: a role has no worker, and none came; too many samples have no finite gradient; the last checkpoint
                cannot be written.
            StorageError: a disk is full or gone.
        """
        watch = asyncio.create_task(HealthMonitor(self.recovery).run())
        main = asyncio.create_task(self._run())
        try:
            await asyncio.wait((watch, main), return_when=asyncio.FIRST_COMPLETED)
            await (watch if watch.done() else main)
            await self._finish_writing()
        except Stopped:
            main.cancel()
            await asyncio.gather(main, return_exceptions=True)
            await self._finish_writing()
        finally:
            for task in (watch, main):
                task.cancel()
            await asyncio.gather(watch, main, return_exceptions=True)
            self.checkpoints.close()

    async def _finish_writing(self) -> None:
        """Wait for what is written in the background, but not for ever.

        Raises:
            RunError: the run is finished, and storage did not take all of it.
        """
        if not await self.checkpoints.drain():
            words = ", ".join(self.checkpoints.close())
            if not self.stopping:
                raise RunError(f"{KEY}: {words}: not written, for its storage does not get on")
            self.recorder.say(f"{words}: not written, for its storage does not get on")
            self.recorder.event("checkpoint-failed", iteration=self.next, why="its storage does not get on")
        self.checkpoints.check_last()
        if self._background:
            await asyncio.wait(self._background, timeout=self.recipe.runtime.dead_after)
        self.checkpoints.check()

    async def _run(self) -> None:
        """Train; after a loss recover and train on."""
        recovered = False
        while True:
            try:
                if not recovered:
                    await self._recover()
                    recovered = True
                async with asyncio.TaskGroup() as self._attempt:
                    self._commits: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
                    self._attempt.create_task(self._commit_in_order())
                    await self._train()
                    self._commits.put_nowait(None)
                return
            except Stopped:
                return
            except BaseExceptionGroup as group:
                errors = _flat(group)
            except (RayError, StepDropped) as error:
                errors = [error]
            recovered = False
            self.recovery.check_errors(errors)

    async def _recover(self) -> None:
        """Bring all workers to one state, and take up the loop there."""
        resume_point = await self.recovery.recover()
        self._forget_the_dropped()
        await self._write_down_committed(resume_point.iteration)
        if resume_point.experts is not None:  # a manifest's state, and not the workers' own
            self.experts, self._paired = resume_point.experts, False
            self._call_stats.clear()
            self.checkpoints.forget()
            self._announced = -1
            self.recorder.rewind(resume_point.iteration)
        self.next = self.committed = resume_point.iteration
        self._fake_updates = resume_point.fake_updates
        if not self._started:
            self._started = True
            facts = {"resumed": self.next} if self.next else {}
            seconds = round(time.perf_counter() - self.began, 3)
            told = {"seconds": seconds, "teacher": self.teacher, **facts}
            self.recorder.event("started", workers=self.actors.sizes, **told)
            self.recorder.begin()

    async def _train(self) -> None:
        await self._load_pairs()
        await self._preview_teacher()
        for phase, end in zip(self.phases, self.ends, strict=True):
            if phase.index < self.experts:
                continue
            if self._halted():  # at the last phase's edge
                return
            self._begin(phase, end)
            while self.next < end and not self._halted():
                await self._change_workers(phase)
                await self._iterate(phase, self.next)
                self.checkpoints.check()
                if self.next < end and (
                    self.next % self.recipe.checkpoint.every == 0 or self.recovery.progress.owes_checkpoint
                ):
                    self._checkpoint(phase.index)
            if self.next < end:  # stopped
                self._checkpoint(phase.index)
                return
            await self._end(phase)
        self.finished = True

    def stop(self) -> None:
        """Commit the iteration under way, write a manifest and return from ``run``."""
        self.stopping = True
        self.recorder.state.enter(State.STOPPING)

    @property
    def pending_calls(self) -> int:
        """Calls that are waited for."""
        return sum(not call.done() for calls in list(self._answers.values()) for call in list(calls))

    def _halted(self) -> bool:
        return self.stopping or (self.until is not None and self.next >= self.until)

    async def _iterate(self, phase: Phase, n: int) -> None:
        """One iteration, or what is left of it: the algorithm."""
        generators, fakes, scorers = self.actors.generators, self.actors.fakes, self.actors.scorers
        first, last = n * self.recipe.method.fake_updates, (n + 1) * self.recipe.method.fake_updates
        scored_at = max(last, self._fake_updates)  # ahead only where stale rollouts were trained on before a loss
        self._roll_out_up_to(min(n + self.recipe.runtime.max_staleness, self._edge(n) - 1))
        for update, rollout in self._rollouts.pop(n).items():
            self._note(n, fakes.consume("update", first + update, inputs=[rollout.results]))
        proposal = self._note(n, generators.produce("propose", n, inputs=self._draw(n, last - first)))
        generated = self._note(n, fakes.produce("score", scored_at, inputs=proposal.results))
        self._prepare(phase, n + 1)
        await asyncio.gather(*proposal.call_stats)
        real = self._note(n, await scorers.map("score", [(result,) for result in proposal.results]))
        self.recovery.progress.scored = n + 1
        self._note(n, generators.consume("update", n, inputs=[real.results, generated.results]))
        self._commits.put_nowait((phase.index, n))
        self.next, self._fake_updates = n + 1, scored_at
        self._prompts.pop(n)
        if n + 1 < self.ends[-1]:
            self._draw(n + 1, 0)  # ask ahead
        self._preview(phase, n)

    def _note(self, n: int, call: Call) -> Call:
        """Keep a call's statistics for the iteration's record; an error of the call ends the attempt."""
        self._call_stats.setdefault(n, []).extend(call.call_stats)
        self._answers.setdefault(n, []).append(self._expect(call.call_stats))
        return call

    def _roll_out_up_to(self, last: int) -> None:
        """Have the fake's samples made for iterations up to ``last`` that have none, by the generator as it is."""
        updates = self.recipe.method.fake_updates
        for n in range(self.next, last + 1):
            if n not in self._rollouts:
                made = max(0, self._fake_updates - n * updates)
                rollout = self.actors.generators.produce
                self._rollouts[n] = {
                    u: self._note(n, rollout("rollout", n, u, inputs=self._draw(n, u))) for u in range(made, updates)
                }

    def _prepare(self, phase: Phase, n: int) -> None:
        """Have the frozen experts' part of the next rollouts made while the generator waits for its scores."""
        if phase.index and n < self.ends[phase.index] and n not in self._rollouts:
            draws = [self._draw(n, u) for u in range(self.recipe.method.fake_updates + 1)]
            self._note(n, self.actors.generators.consume("prepare", n, inputs=draws))

    def _edge(self, n: int) -> int:
        """Return the next iteration after ``n`` at which rollouts start afresh, so that a resumed run is the same."""
        every, end = self.recipe.checkpoint.every, next(end for end in self.ends if end > n)
        return min(end, (n // every + 1) * every)

    def _draw(self, n: int, draw: int) -> list[ObjectRef]:
        """Return the conditions of draw ``draw`` of iteration ``n``, one reference a micro-batch."""
        micros = self.recipe.batch.micros
        if n not in self._prompts:
            count = micros * (self.recipe.method.fake_updates + 1)
            taken = self.actors.prompts.take.options(num_returns=count).remote(n)
            self._prompts[n] = taken if isinstance(taken, list) else [taken]
        return self._prompts[n][draw * micros : (draw + 1) * micros]

    def _begin(self, phase: Phase, end: int) -> None:
        """Start a phase in every trainer that is not in it."""
        start = end - self.lengths[phase.index]
        for group in self.actors.groups.values():
            self._expect(group.all("start_phase", phase.index, start))
        if phase.index != self._announced:
            self.recorder.event("phase", phase=phase.index + 1, iteration=self.next, end=phase.end)
            self._announced = phase.index

    async def _end(self, phase: Phase) -> None:
        """Fix the expert, keep it, and record that the phase is done."""
        generators = self.actors.generators
        await asyncio.gather(*generators.all("end_phase", phase.index, self.next))
        written = self.checkpoints.put_expert(phase.index, generators.one("expert", phase.index))
        if not await self.checkpoints.wait_for(written) and not self.stopping:
            limit = self.recipe.runtime.dead_after
            self.recorder.say(f"going on: the storage of checkpoints has not got on for {limit:g} s")
            self.recorder.event("checkpoint-late", phase=phase.index + 1, iteration=self.next)
        self.experts = phase.index + 1
        self._checkpoint(self.experts)

    async def _change_workers(self, phase: Phase) -> None:
        """At an iteration's edge admit newcomers and release workers that leave."""
        at = {
            "generator": TrainerProgress(phase.index, self.next),
            "fake": TrainerProgress(phase.index, self._fake_updates),
        }
        self._expect(self.recovery.membership.edge(at))
        if self.recovery.membership.must_pause():
            await self.checkpoints.wait_for(self._checkpoint(phase.index))
            raise StepDropped("the last worker of a role has to leave its node")

    def _checkpoint(self, phase: int) -> asyncio.Future[None]:
        """Have the state at this edge written in the background, once; at a phase's edge the experts are the state."""
        n, fakes = self.next, self._fake_updates
        if (known := self.checkpoints.of(n)) is not None:
            return known
        manifest = Manifest(
            iteration=n,
            phase=phase,
            generator_version=n,
            fake_version=fakes,
            fake_cursor=fakes * self.recipe.batch.size,
            generator_cursor=n * self.recipe.batch.size,
            seed=self.recipe.seed,
            experts=self.experts,
            teacher=self.teacher,
        )
        groups = {} if n in self.ends else self.actors.groups
        at = {"generator": n, "fake": fakes}
        states = [group.one("state", at[role]) for role, group in groups.items()]
        self.recovery.progress.owes_checkpoint = False
        return self.checkpoints.put_manifest(manifest, list(groups), states)

    def _preview(self, phase: Phase, n: int) -> None:
        """Have a grid of samples drawn now and then."""
        every = self.recipe.monitor.samples_every
        if every and ((n + 1) % every == 0 or n + 1 in self.ends):
            count = self.recipe.monitor.samples
            conditions = self.actors.prompts.rows.remote(0, count)
            drawn = self.actors.generators.one("preview", count, conditions, n + 1)
            self._behind(self._show(f"student-{n + 1:06d}", drawn))

    async def _preview_teacher(self) -> None:
        """Have the teacher draw the pictures that the student's will be held against."""
        if self.recipe.monitor.samples_every and not self.next and not self._previewed:
            count = self.recipe.monitor.samples
            drawn = await self.actors.scorers.map("preview", [(count, self.actors.prompts.rows.remote(0, count))])
            self._previewed = True
            self._behind(self._show("teacher", drawn.results[0]))

    async def _show(self, name: str, drawn: ObjectRef) -> None:
        try:
            self.recorder.pictures(name, await drawn)
        except RayError:
            pass  # whoever drew it was lost; the next grid comes
        except StorageError as error:
            self.checkpoints.end_with(error)

    async def _load_pairs(self) -> None:
        """Have the teacher make the ODE pairs for DMD's regression."""
        total, chunk = self.recipe.method.regression.pairs, 256
        if not self.recipe.method.regression.weight or self._paired or self.next >= self.ends[-1]:
            return
        work = [(start, min(chunk, total - start)) for start in range(0, total, chunk)]
        inputs = [(start, count, self.actors.prompts.pairs.remote(start, count)) for start, count in work]
        pairs = await self.actors.scorers.map("pairs", inputs)
        await asyncio.gather(*self.actors.generators.all("load_pairs", *pairs.results))
        self._paired = True

    async def _commit_in_order(self) -> None:
        """Wait for all calls of an iteration, then write it down."""
        while (entry := await self._commits.get()) is not None:
            phase, n = entry
            answers = await asyncio.gather(*self._answers.pop(n))
            line = self._write_down(phase, n, [stats for answer in answers for stats in answer])
            self.recovery.step_committed(n, line["seconds"])

    def _write_down(self, phase: int, n: int, call_stats: list[CallStats]) -> dict[str, Any]:
        del self._call_stats[n]
        self.committed = n + 1
        self.recovery.measure(call_stats)
        line = self.recorder.iteration(phase, n, call_stats, self.actors.sizes, self.actors.scorers.depth)
        refuse_too_many(self.recipe, n, line["zeroed_samples"])
        return line

    async def _write_down_committed(self, iteration: int) -> None:
        """Write down iterations that are committed, though statistics of some of their calls may be lost."""
        for n in sorted(self._call_stats):
            call_stats = await asyncio.gather(*self._call_stats[n], return_exceptions=True)
            if n < iteration:
                phase = next(index for index, end in enumerate(self.ends) if n < end)
                self._write_down(phase, n, [stats for stats in call_stats if isinstance(stats, CallStats)])

    def _forget_the_dropped(self) -> None:
        """Have nothing under way."""
        self._prompts: dict[int, list[ObjectRef]] = {}
        self._rollouts: dict[int, dict[int, Call]] = {}
        self._answers: dict[int, list[asyncio.Task[list[CallStats]]]] = {}

    def _expect(self, references: list[ObjectRef]) -> asyncio.Task[list[Any]]:
        """Wait for calls beside the loop, so that an error of theirs ends the attempt at once."""

        async def arrive() -> list[Any]:
            return await asyncio.gather(*references)

        return self._attempt.create_task(arrive())

    def _behind(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _flat(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [e for part in group.exceptions for e in (_flat(part) if isinstance(part, BaseExceptionGroup) else [part])]


def micro_batches(recipe: Recipe) -> list[MicroBatch]:
    """Cut the global batch as the recipe says."""
    size = recipe.batch.micro or recipe.batch.size
    return [MicroBatch(index, index * size, size) for index in range(recipe.batch.micros)]
