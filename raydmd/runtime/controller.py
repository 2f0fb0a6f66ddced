"""The controller: a run's loop over phases and iterations. Only references pass through it."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError

from raydmd.config.recipe import Recipe
from raydmd.data.trajectories import PAIR_CHUNK
from raydmd.errors import RunError, StorageError
from raydmd.locations import KEY
from raydmd.methods.program import MethodTrace
from raydmd.runtime.actors import RunActors
from raydmd.runtime.checkpoint.manager import Manifest
from raydmd.runtime.checkpoint.plan import run_plan
from raydmd.runtime.executor import RayExecutor
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import Stopped
from raydmd.runtime.recovery.health import HealthMonitor
from raydmd.runtime.recovery.manager import RecoveryManager
from raydmd.runtime.recovery.state import State
from raydmd.runtime.workers.base import CallStats, TrainerProgress
from raydmd.runtime.workers.process_group import StepDropped
from raydmd.runtime.workers.trainer_group import Call
from raydmd.sampling.phase import Phase
from raydmd.training.zeroed import refuse_too_many


@dataclass
class Controller:
    """Runs a distillation to its end, or to ``stop()``.

    The method's iterations are the executor's (`raydmd.runtime.executor`). When a worker is lost, what was under way is
    dropped, the survivors say how far they are, and the loop goes on from there: the same calls give the same bits.

    Args:
        recipe: the run's recipe.
        trace: what its method does.
        actors: the run's actors.
        recorder: where figures go.
        until: stop once this many iterations are committed.
        began: time.perf_counter() when the run began.
        teacher: the teacher's fingerprint.
        initial: that of the student that experts start from; "": the teacher.
    """

    recipe: Recipe
    trace: MethodTrace
    actors: RunActors
    recorder: Recorder
    until: int | None = None
    began: float = field(default_factory=time.perf_counter)
    teacher: str = ""
    initial: str = ""

    def __post_init__(self) -> None:
        self.phases, self.ends, self.method = self.trace.phases, self.trace.ends, self.trace.method
        self.student, self.sampler = self.actors.groups[self.method.student], self.actors.pools[self.method.teacher]
        self.next = self.committed = self.experts = 0
        self._announced = -1  # the phase of the last event
        self._started = False
        self.finished = self.stopping = self._paired = self._previewed = False
        self.recovery = RecoveryManager(self.recipe, self.trace, self.actors, self.recorder, lambda: self.stopping)
        self.executor = RayExecutor(self.recipe, self.trace, self.actors, self._note, self._answered)
        self._background: set[asyncio.Task[None]] = set()
        self.checkpoints, self.plan = self.recovery.checkpoints, run_plan(self.recipe, self.trace)
        self._call_stats: dict[int, list[ObjectRef]] = {}
        self._answers: dict[int, list[asyncio.Task[list[CallStats]]]] = {}

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
        self.executor.forget(resume_point.updates)
        self._answers = {}
        await self._write_down_committed(resume_point.iteration)
        if resume_point.experts is not None:  # a manifest's state, and not the workers' own
            self.experts, self._paired = resume_point.experts, False
            self._call_stats.clear()
            self.checkpoints.forget()
            self._announced = -1
            self.recorder.rewind(resume_point.iteration)
        self.next = self.committed = resume_point.iteration
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
            self._begin(phase)
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
        """Send one iteration, or what is left of it."""
        await self.executor.run(n)
        self._commits.put_nowait((phase.index, n))
        self.next = n + 1
        self._preview(phase, n)

    def _note(self, n: int, call: Call) -> None:
        """Keep a call's statistics for the iteration's record; an error of the call ends the attempt."""
        self._call_stats.setdefault(n, []).extend(call.call_stats)
        self._answers.setdefault(n, []).append(self._expect(call.call_stats))

    def _answered(self, n: int) -> None:
        self.recovery.progress.scored = n + 1

    def _begin(self, phase: Phase) -> None:
        """Start a phase in every trainer that is not in it."""
        start = self.trace.updates_before(self.ends[phase.index - 1] if phase.index else 0)
        for role, group in self.actors.groups.items():
            self._expect(group.all("start_phase", phase.index, start[role]))
        if phase.index != self._announced:
            self.recorder.event("phase", phase=phase.index + 1, iteration=self.next, end=phase.end)
            self._announced = phase.index

    async def _end(self, phase: Phase) -> None:
        """Fix the expert, keep it, and record that the phase is done."""
        await asyncio.gather(*self.student.all("end_phase", phase.index, self.executor.updates[self.student.role]))
        written = self.checkpoints.put_expert(phase.index, self.student.one("expert", phase.index))
        if not await self.checkpoints.wait_for(written) and not self.stopping:
            limit = self.recipe.runtime.dead_after
            self.recorder.say(f"going on: the storage of checkpoints has not got on for {limit:g} s")
            self.recorder.event("checkpoint-late", phase=phase.index + 1, iteration=self.next)
        self.experts = phase.index + 1
        self._checkpoint(self.experts)

    async def _change_workers(self, phase: Phase) -> None:
        """At an iteration's edge admit newcomers and release workers that leave."""
        at = {role: TrainerProgress(phase.index, updates) for role, updates in self.executor.updates.items()}
        self._expect(self.recovery.membership.edge(at))
        if self.recovery.membership.must_pause():
            await self.checkpoints.wait_for(self._checkpoint(phase.index))
            raise StepDropped("the last worker of a role has to leave its node")

    def _checkpoint(self, phase: int) -> asyncio.Future[None]:
        """Have the state at this edge written in the background, once; at a phase's edge the experts are the state."""
        n, updates = self.next, dict(self.executor.updates)
        if (known := self.checkpoints.of(n)) is not None:
            return known
        manifest = Manifest(
            iteration=n,
            phase=phase,
            updates=updates,
            cursors=self.plan.cursors(n),
            seed=self.recipe.seed,
            experts=self.experts,
            teacher=self.teacher,
            initial=self.initial,
        )
        groups = {} if n in self.ends else self.actors.groups
        states = [group.one("state", updates[role]) for role, group in groups.items()]
        self.recovery.progress.owes_checkpoint = False
        return self.checkpoints.put_manifest(manifest, list(groups), states)

    def _preview(self, phase: Phase, n: int) -> None:
        """Have a grid of samples drawn now and then."""
        every = self.recipe.monitor.samples_every
        if every and ((n + 1) % every == 0 or n + 1 in self.ends):
            count = self.recipe.monitor.samples
            conditions = self.actors.prompts.previews.remote(count)
            drawn = self.student.one("preview", count, conditions, self.executor.updates[self.student.role])
            self._behind(self._show(f"student-{n + 1:06d}", drawn))

    async def _preview_teacher(self) -> None:
        """Have the teacher draw the pictures that the student's will be held against."""
        if self.recipe.monitor.samples_every and not self.next and not self._previewed:
            count = self.recipe.monitor.samples
            drawn = await self.sampler.map("preview", [(count, self.actors.prompts.previews.remote(count))])
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
        """Have the teacher make the ODE pairs that the student needs, or have its workers read those of a folder."""
        total, chunk = self.method.pairs, PAIR_CHUNK
        if not total or self._paired or self.next >= self.ends[-1]:
            return
        if self.recipe.pairs.path is not None:
            await asyncio.gather(*self.student.all("open_pairs"))
            self._paired = True
            return
        work = [(start, min(chunk, total - start)) for start in range(0, total, chunk)]
        inputs = [(start, count, self.actors.prompts.pairs.remote(start, count)) for start, count in work]
        pairs = await self.sampler.map("pairs", inputs)
        await asyncio.gather(*self.student.all("load_pairs", *pairs.results))
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
        line = self.recorder.iteration(phase, n, call_stats, self.actors.sizes, self.actors.queued)
        refuse_too_many(self.recipe, n, line["zeroed_samples"])
        return line

    async def _write_down_committed(self, iteration: int) -> None:
        """Write down iterations that are committed, though statistics of some of their calls may be lost."""
        for n in sorted(self._call_stats):
            call_stats = await asyncio.gather(*self._call_stats[n], return_exceptions=True)
            if n < iteration:
                phase = next(index for index, end in enumerate(self.ends) if n < end)
                self._write_down(phase, n, [stats for stats in call_stats if isinstance(stats, CallStats)])

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
