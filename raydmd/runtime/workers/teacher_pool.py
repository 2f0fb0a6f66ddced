"""A frozen role's pool: workers without a state that take micro-batches as they finish; a loss costs one of those."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Any

from ray import ObjectRef

from raydmd.errors import RunError
from raydmd.runtime.membership.role_workers import WorkerHandle
from raydmd.runtime.recovery.faults import LOSSES_PER_FAILURE, in_words, is_gone, own_fault
from raydmd.runtime.workers.trainer_group import Call

DEPTH = 2  # micro-batches that a worker holds at once, so that it need not wait for the next to arrive
MEMORY = 0.5  # weight of the newest measurement in a worker's seconds a micro-batch
LATE = 3.0  # an idle worker does again what its holder needs more than this many times as long for...
GRACE = 0.1  # ...and this many seconds: messages may be late, too
RESTED = 20  # batches without work after which a worker's speed is measured anew, on something that another does, too


@dataclass(eq=False)
class _Job:
    method: str
    arguments: tuple[Any, ...]
    answer: asyncio.Future[tuple[ObjectRef, ObjectRef]]
    failures: int = 0
    losses: int = 0  # workers that were lost while they had it
    again: bool = False  # a second worker was given it


@dataclass(eq=False)
class _Seat:
    """A worker's place: what it holds, oldest first, since when it has the oldest, and how long each method takes."""

    worker: WorkerHandle
    held: list[_Job] = field(default_factory=list)
    begun: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    rested: int = 0  # batches since it was given anything
    leaving: bool = False


class ScorerPool:
    """Hands each micro-batch to the worker that will be done with it first.

    A fast worker so takes more, and at the end of a batch a slow one is not given what a fast one would finish
    sooner. A lost worker's micro-batches go to the others, and what one is very late with is done again by an idle
    one; the first answer counts, for all would be the same.

    Args:
        tries: failures of a micro-batch by workers' own fault after which the error is raised.
        lost: called with a worker that died and the error.
    """

    def __init__(
        self, tries: int, lost: Callable[[WorkerHandle, BaseException], None] = lambda worker, error: None
    ) -> None:
        self.tries, self.lost = tries, lost
        self._seats: list[_Seat] = []
        self._queue: deque[_Job] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def workers(self) -> list[WorkerHandle]:
        """Who takes work."""
        return [seat.worker for seat in self._open()]

    @property
    def depth(self) -> int:
        """Micro-batches that nobody has begun to take."""
        return len(self._queue)

    def holds(self, worker: WorkerHandle) -> bool:
        """Whether a worker, in the pool or leaving it, still works on something."""
        return any(seat.held for seat in self._seats if seat.worker is worker)

    def add(self, worker: WorkerHandle) -> None:
        """Let a worker take part from now on."""
        self._seats.append(_Seat(worker))
        self._hand_out()

    def remove(self, worker: WorkerHandle) -> None:
        """Give a worker nothing more; what it holds, it may finish."""
        for seat in self._seats:
            seat.leaving |= seat.worker is worker
        self._hand_out()

    async def map(self, method: str, inputs: list[tuple[Any, ...]]) -> Call:
        """Call the parts' ``method(*input)`` for each input on whichever workers there are; return when all answered.

        Raises:
            ray.exceptions.RayError: an input failed for its own fault ``tries`` times, or is itself lost.
            RunError: workers that had an input were lost again and again.
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
        for seat in self._seats:
            seat.rested += 1
        return Call([result for result, _ in answers], [stats for _, stats in answers])

    # who takes what

    def _open(self) -> list[_Seat]:
        return [seat for seat in self._seats if not seat.leaving]

    def _hand_out(self) -> None:
        self._seats = [seat for seat in self._seats if seat.held or not seat.leaving]
        while self._queue and (seat := self._taker(self._queue[0].method)) is not None:
            self._give(seat, self._queue.popleft())
        self._do_again()

    def _give(self, seat: _Seat, job: _Job) -> None:
        if not seat.held:
            seat.begun = time.monotonic()
        seat.held.append(job)
        seat.rested = 0
        task = asyncio.create_task(self._work(seat, job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _known(self, method: str) -> list[float]:
        return [seat.seconds[method] for seat in self._seats if method in seat.seconds]

    def _each(self, seat: _Seat, method: str) -> float:
        """Return a worker's seconds for one call: its own as measured, else the mean of those measured."""
        known = self._known(method) or [1.0]
        return seat.seconds.get(method, sum(known) / len(known))

    def _due(self, seat: _Seat) -> list[float]:
        """Return in how many seconds each thing that a worker holds will be done; what is overdue, ever later."""
        costs = [self._each(seat, job.method) for job in seat.held]
        if costs:
            costs[0] = abs(costs[0] - (time.monotonic() - seat.begun))
        return list(accumulate(costs))

    def _taker(self, method: str) -> _Seat | None:
        """Go through the queue, each micro-batch to who is done first; return the first who can have one at once.

        None: all would be done sooner by those whose hands are full.
        """
        seats = self._open()
        each = [self._each(seat, method) for seat in seats]
        done = [(sum(self._due(seat)[-1:]) + cost, n) for n, (seat, cost) in enumerate(zip(seats, each, strict=True))]
        heapify(done)
        for _ in self._queue if seats else ():
            when, n = done[0]
            if len(seats[n].held) < DEPTH:
                return seats[n]
            heapreplace(done, (when + each[n], n))
        return None

    def _do_again(self) -> None:
        """Give idle workers, once, what others are late with; look again while anybody might become late."""
        if self._look_again is not None:
            self._look_again.cancel()
        held = [(due, job) for seat in self._seats for due, job in zip(self._due(seat), seat.held, strict=True)]
        once = [(due, job) for due, job in held if not (job.again or job.answer.done()) and self._known(job.method)]
        once.sort(key=lambda entry: entry[0])
        idle = [seat for seat in self._open() if not seat.held]
        if idle and (once or self._queue):
            self._look_again = asyncio.get_running_loop().call_later(GRACE, self._hand_out)
        for seat in idle if not self._queue else ():
            if once and (seat.rested >= RESTED or once[-1][0] > GRACE + LATE * self._each(seat, once[-1][1].method)):
                job = once.pop()[1]
                job.again = True
                if seat.rested >= RESTED:
                    seat.seconds.pop(job.method, None)
                self._give(seat, job)

    # what comes back

    async def _work(self, seat: _Seat, job: _Job) -> None:
        try:
            result, stats = seat.worker.actor.call.options(num_returns=2).remote(job.method, *job.arguments)
            cost = await stats
        except Exception as error:
            self._take_back(seat, job)
            self._failed(seat, job, error)
        else:
            newest = max(cost.busy_seconds, self._take_back(seat, job))
            seat.seconds[job.method] = MEMORY * newest + (1 - MEMORY) * seat.seconds.get(job.method, newest)
            seat.worker.speed = 1 / max(seat.seconds[job.method], 1e-9)
            if not job.answer.done():
                job.answer.set_result((result, stats))
        self._hand_out()

    @staticmethod
    def _take_back(seat: _Seat, job: _Job) -> float:
        """Take back what a worker held; return its seconds for it, messages' included."""
        seat.held.remove(job)
        took, seat.begun = time.monotonic() - seat.begun, time.monotonic()
        return took

    def _failed(self, seat: _Seat, job: _Job, error: Exception) -> None:
        gone, fault = is_gone(error), own_fault(error) is not None
        if gone and not seat.leaving:
            self.remove(seat.worker)
            self.lost(seat.worker, error)
        if job.answer.done():
            return
        job.failures += fault
        job.losses += gone
        if job.failures >= self.tries or not (gone or fault):
            job.answer.set_exception(error)  # for ever its own fault, or what it was to score is lost
        elif job.losses >= LOSSES_PER_FAILURE * self.tries:
            last = f"{seat.worker.name}: {in_words(error)}"
            job.answer.set_exception(
                RunError(f"workers were lost {job.losses} times at one micro-batch, the last time {last}")
            )
        elif not any(job in other.held for other in self._seats):
            job.again = False
            self._queue.appendleft(job)
