"""The scorer pool: stateless workers that take micro-batches as they finish, and whose loss costs a micro-batch."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef

from raydmd.runtime.crew import Member
from raydmd.runtime.faults import is_gone, own_fault
from raydmd.runtime.groups import Call

DEPTH = 2  # micro-batches that a worker holds at once, so that it need not wait for the next to arrive
MEMORY = 0.5  # weight of the newest measurement in a worker's seconds a micro-batch


@dataclass(eq=False)
class _Job:
    method: str
    arguments: tuple[Any, ...]
    answer: asyncio.Future[tuple[ObjectRef, ObjectRef]]
    failures: int = 0


@dataclass(eq=False)
class _Seat:
    """A worker's place: what it holds, oldest first, and how long it takes for one."""

    member: Member
    held: list[_Job] = field(default_factory=list)
    seconds: float | None = None
    begun: float = 0.0

    def next_done(self, now: float, guess: float) -> float:
        """Return in how many seconds one more micro-batch would be done here."""
        each = guess if self.seconds is None else self.seconds
        first = max(0.0, each - (now - self.begun)) if self.held else 0.0
        return first + each * max(len(self.held) - 1, 0) + each


class ScorerPool:
    """Hands each micro-batch to the worker that will be done with it first.

    A fast worker so takes more, and at the end of a batch a slow one is not given what a fast one would finish
    sooner. A lost worker's micro-batches go to the others; its late answers are dropped.

    Args:
        tries: failures of a micro-batch by workers' own fault after which the error is raised.
        lost: called with a worker that died and the error.
    """

    def __init__(self, tries: int, lost: Callable[[Member, BaseException], None] = lambda member, error: None) -> None:
        self.tries, self.lost = tries, lost
        self._seats: list[_Seat] = []
        self._queue: deque[_Job] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def members(self) -> list[Member]:
        """Who takes work."""
        return [seat.member for seat in self._seats]

    @property
    def depth(self) -> int:
        """Micro-batches that nobody has begun to take."""
        return len(self._queue)

    def holds(self, member: Member) -> bool:
        """Whether a worker, in the pool or leaving it, still works on something."""
        return any(task.get_name() == member.name for task in self._tasks)

    def add(self, member: Member) -> None:
        """Let a worker take part from now on."""
        self._seats.append(_Seat(member))
        self._hand_out()

    def remove(self, member: Member) -> None:
        """Give a worker nothing more; what it holds, it may finish."""
        self._seats = [seat for seat in self._seats if seat.member is not member]
        self._hand_out()

    async def map(self, method: str, inputs: list[tuple[Any, ...]]) -> Call:
        """Call ``method(*input)`` for each input on whichever workers there are; return once all have answered.

        Raises:
            ray.exceptions.RayError: an input failed for its own fault ``tries`` times, or is itself lost.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(method, arguments, loop.create_future()) for arguments in inputs]
        self._queue.extend(jobs)
        self._hand_out()
        try:
            answers = await asyncio.gather(*(job.answer for job in jobs))
        except BaseException:
            for job in jobs:
                job.answer.cancel()
            self._queue = deque(job for job in self._queue if job not in jobs)
            raise
        return Call([result for result, _ in answers], [receipt for _, receipt in answers])

    def _hand_out(self) -> None:
        while self._queue and (seat := self._taker()) is not None:
            job = self._queue.popleft()
            if not seat.held:
                seat.begun = time.monotonic()
            seat.held.append(job)
            call = getattr(seat.member.actor, job.method).options(num_returns=2)
            result, receipt = call.remote(*job.arguments)
            task = asyncio.create_task(self._finish(seat, job, result, receipt), name=seat.member.name)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _taker(self) -> _Seat | None:
        """Return who would be done first with one more; None if that worker's hands are full."""
        if not self._seats:
            return None
        now = time.monotonic()
        known = [seat.seconds for seat in self._seats if seat.seconds is not None]
        guess = sum(known) / len(known) if known else 1.0
        best = min(self._seats, key=lambda seat: (seat.next_done(now, guess), len(seat.held)))
        return best if len(best.held) < DEPTH else None

    async def _finish(self, seat: _Seat, job: _Job, result: ObjectRef, receipt: ObjectRef) -> None:
        try:
            cost = await receipt
        except Exception as error:
            seat.held.remove(job)
            self._failed(seat, job, error)
        else:
            seat.held.remove(job)
            newest = cost.busy_seconds
            seat.seconds = newest if seat.seconds is None else MEMORY * newest + (1 - MEMORY) * seat.seconds
            seat.member.speed = 1 / max(seat.seconds, 1e-9)
            seat.begun = time.monotonic()
            if not job.answer.done():
                job.answer.set_result((result, receipt))
        self._hand_out()

    def _failed(self, seat: _Seat, job: _Job, error: Exception) -> None:
        gone = is_gone(error)
        if gone and seat in self._seats:
            self.remove(seat.member)
            self.lost(seat.member, error)
        if job.answer.done():
            return
        if own_fault(error) is not None:
            job.failures += 1
        if job.failures >= self.tries or not (gone or own_fault(error) is not None):
            job.answer.set_exception(error)  # for ever its own fault, or what it was to score is lost
        else:
            self._queue.appendleft(job)
