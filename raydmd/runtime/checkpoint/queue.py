"""What waits for the checkpoint writer: one call at a time, experts first, of the manifests only the newest."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError

from raydmd.errors import RunError, StorageError
from raydmd.locations import KEY
from raydmd.runtime.checkpoint.manager import Manifest
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import Stopped, cause_of, own_fault
from raydmd.runtime.recovery.helper_health import START_S, WRITER, HelperMonitor

STOP_PATIENCE_S = 30.0  # without progress: a run that is to stop then leaves its last checkpoint
LOOK_EVERY_S = 0.1
TRIES = 3  # of an expert that nobody waits for any more


@dataclass(eq=False)
class _Job:
    """A call of the writer's to come; ``states`` are what it takes."""

    what: str
    states: list[ObjectRef]
    done: asyncio.Future[None]
    iteration: int = -1
    manifest: Manifest | None = None
    names: list[str] = field(default_factory=list)
    expert: int = -1
    ready: bool = False
    waited_for: bool = True


class CheckpointQueue:
    """Hands experts and manifests to the checkpoint writer.

    States are fetched to the driver's node, where the writer is, as soon as they are made: whoever made them may be
    lost. A manifest that waits is dropped once the states of a newer one are there, so that at most one is written
    and one waits, and the newest edge is kept however slow the store or however long the writer's restart is.

    Args:
        writer: the checkpoint writer's actor.
        monitor: knows how the writer gets on.
        recorder: told what was written.
        lost: called when a manifest's states were lost: another is due.
        stopping: says whether the run is to stop.
    """

    def __init__(
        self,
        writer: Any,
        monitor: HelperMonitor,
        recorder: Recorder,
        lost: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.writer, self.monitor, self.recorder, self.lost, self.stopping = writer, monitor, recorder, lost, stopping
        self._jobs: list[_Job] = []  # in order; the one that is being written stays until it is
        self._writing: _Job | None = None
        self._last: _Job | None = None  # the newest edge that is written, or is to be
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: asyncio.Task[None] | None = None
        self._late: RunError | None = None  # what ends the run
        self._unwritten: RunError | None = None  # why the newest manifest that was tried was not written
        self._busy_since: float | None = None  # when the writer was asked for what it is to do now
        self._gave_up_since: float | None = None  # when the wait began that a run that is to stop gave up

    # what comes in

    def of(self, iteration: int) -> asyncio.Future[None] | None:
        """Return the future of an iteration's manifest, if it is written or is to be."""
        return self._last.done if self._last is not None and self._last.iteration == iteration else None

    def forget(self) -> None:
        """Have the next edge written, whichever it is: the run went back."""
        self._last = None

    def put_manifest(self, manifest: Manifest, names: list[str], states: list[ObjectRef]) -> asyncio.Future[None]:
        """Have a manifest written with these trainers' states; the future is done when it is, or has failed."""
        job = _Job(f"the manifest of iteration {manifest.iteration}", states, asyncio.Future(), manifest.iteration)
        job.manifest, job.names = manifest, names
        self._last = job
        self._add(job)
        return job.done

    def put_expert(self, index: int, weights: ObjectRef) -> asyncio.Future[None]:
        """Have a finished expert written; the future is done when it is, and raises what hindered it."""
        for job in self._jobs:
            if job.expert == index:
                job.waited_for = True
                return job.done
        job = _Job(f"the expert of phase {index + 1}", [weights], asyncio.Future(), expert=index)
        self._add(job)
        return job.done

    def check(self) -> None:
        """Raise what ends the run, though it does not wait for what is written.

        Raises:
            RunError: an expert cannot be written.
            StorageError: a disk is full or gone, or another driver has taken the place over.
        """
        if self._late is not None:
            raise self._late

    def check_last(self) -> None:
        """Raise what `check` does, or what hindered the last manifest.

        Raises:
            RunError: an expert or the last manifest cannot be written.
        """
        self.check()
        if self._unwritten is not None:
            raise self._unwritten

    def end_with(self, error: StorageError) -> None:
        """Have the next `check` raise an error of the run's disk."""
        self._late = error

    # waiting

    async def wait_for(self, done: asyncio.Future[None]) -> bool:
        """Wait for something that was put in; return whether it is done: False once the writer has not got on.

        That is for ``runtime.dead_after`` seconds, or for `STOP_PATIENCE_S` of a run that is to stop.
        """
        waited = await self._wait(done.done, self.monitor.dead_after_s)
        for job in self._jobs:
            if job.done is done:
                job.waited_for = waited
        if waited:
            done.result()
        return waited

    async def drain(self) -> bool:
        """Wait until nothing waits any more; return whether that is so, as `wait_for` does, with time for a restart."""
        return await self._wait(lambda: not self._jobs, self.monitor.dead_after_s + START_S)

    async def restore(self) -> Any:
        """Have the newest manifest read, after what waits is written.

        Raises:
            Stopped: the run is to stop, and the writer does not get on.
            RunError: the writer does not get on.
            ray.exceptions.RayError: what the writer raises.
        """
        limit = self.monitor.dead_after_s + START_S
        if await self.drain():
            restored = asyncio.ensure_future(self._restore())
            if await self._wait(restored.done, limit):
                return restored.result()
            restored.cancel()
        if self.stopping():
            raise Stopped
        raise RunError(f"{KEY}: its storage did not get on for {limit:g} s, and the run cannot go on without it")

    async def _restore(self) -> Any:
        self._busy_since = time.monotonic()
        try:
            return await self.writer.restore.remote()
        finally:
            self._busy_since = None

    async def _wait(self, until: Callable[[], bool], limit: float) -> bool:
        begin = self._gave_up_since or time.monotonic()
        while not until():
            now = time.monotonic()
            busy = 0.0 if self._busy_since is None else now - self._busy_since  # else states are on their way to it
            still = min(now - begin, busy, self.monitor.still_s(WRITER))
            if still > (min(STOP_PATIENCE_S, limit) if self.stopping() else limit):
                self._gave_up_since = begin if self.stopping() else None
                return False
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
        return True

    def close(self) -> list[str]:
        """Give up what waits; return it in words."""
        for task in (*self._tasks, *([self._runner] if self._runner is not None else [])):
            task.cancel()
        return [job.what for job in self._jobs]

    # what goes out

    def _add(self, job: _Job) -> None:
        self._jobs.append(job)
        task = asyncio.create_task(self._fetch(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, job: _Job) -> None:
        """Have a job's states on this node; those of older edges are then needed no longer."""
        try:
            for state in job.states:
                await state
        except RayError as error:
            self._failed(job, error)
            return
        if job not in self._jobs:
            return
        job.ready = True
        if job.manifest is not None:
            for old in [old for old in self._jobs[: self._jobs.index(job)] if old.manifest is not None]:
                if old is not self._writing:
                    self._end(old)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        while ready := [job for job in self._jobs if job.ready]:
            job = next((job for job in ready if job.expert >= 0), ready[-1])
            self._writing, self._busy_since = job, time.monotonic()
            try:
                await (self._write_expert(job) if job.expert >= 0 else self._write_manifest(job))
            except RayError as error:
                self._failed(job, error)
            finally:
                self._writing = self._busy_since = None

    async def _write_manifest(self, job: _Job) -> None:
        whole, seconds = await self.writer.save.remote(job.manifest, job.names, *job.states)
        size = sum(file["bytes"] for file in whole.files.values())
        self.recorder.event("checkpoint", iteration=job.iteration, bytes=size, seconds=round(seconds, 3))
        self.recorder.exported.checkpoint(size, seconds)
        self._unwritten = None
        self._end(job)

    async def _write_expert(self, job: _Job) -> None:
        for tried in range(1, TRIES + 1):
            try:
                await self.writer.save_expert.remote(job.expert, *job.states)
                break
            except RayError:
                if job.waited_for or tried == TRIES:  # whoever waits tries again
                    raise
        self._end(job)

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        self._jobs.remove(job)
        if error is None or job.manifest is not None:
            job.done.set_result(None)
        else:
            job.done.set_exception(error)
            job.done.exception()  # it need not be asked for
        self._changed.set()

    def _failed(self, job: _Job, error: RayError) -> None:
        if job not in self._jobs:
            return
        if job is self._last:
            self._last = None
        self._end(job, error)
        if job.manifest is None:
            if not job.waited_for:
                self._late = RunError(f"{job.what} was not written: {cause_of(error)}")
        elif own_fault(error) is None:  # somebody whose state it needed was lost
            self.lost()
        elif isinstance(cause := cause_of(error), StorageError):
            self._late = cause
        else:
            self._unwritten = RunError(f"the last checkpoint was not written ({cause}); the same command goes on")
            self.recorder.say(f"a checkpoint was not written: {cause_of(error)}")
            self.recorder.event("checkpoint-failed", iteration=job.iteration, why=str(cause_of(error))[:300])
