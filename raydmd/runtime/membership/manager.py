"""Which workers join and leave: groups and the pool grow and shrink between their roles' min and max."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef

from raydmd.runtime.actors import RunActors
from raydmd.runtime.membership.role_workers import RoleWorkers, WorkerHandle
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.state import State
from raydmd.runtime.workers.base import TrainerProgress
from raydmd.runtime.workers.teacher_pool import ScorerPool

PAUSE = 5.0  # seconds before its node goes away at which a role's last worker stops at the latest


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        committed: iterations that are committed.
        scored: iterations for which the frozen roles have answered.
        iteration_seconds: how long the last one took.
        started: whether all workers were of one state once: the run has begun.
        owes_checkpoint: whether a manifest is due at the next edge.
    """

    committed: int = 0
    scored: int = 0
    iteration_seconds: float = 0.0
    started: bool = False
    owes_checkpoint: bool = False


@dataclass
class MembershipManager:
    """Admits workers that have arrived and releases those that leave.

    Args:
        actors: the run's actors.
        recorder: told what happens.
        progress: of the run.
        student: the trained role that holds the experts.
    """

    actors: RunActors
    recorder: Recorder
    progress: Progress
    student: str
    _leaving: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def edge(self, at: dict[str, TrainerProgress]) -> list[ObjectRef]:
        """Between two iterations, admit workers and release those that leave; return references to what that takes.

        Args:
            at: where each trained role stands once all calls made so far have run.
        """
        waits: list[ObjectRef] = []
        for role, group in self.actors.groups.items():
            workers = self.actors.role_workers[role]
            leaving = [worker for worker in group.replicas if worker.leaving is not None]
            stay = [worker for worker in group.replicas if worker.leaving is None]
            enough = len(stay) + len(workers.arrived) >= workers.settings.min_workers
            if not enough and not (stay and any(self.must_go(worker) for worker in leaving)):
                leaving = []
            if not workers.arrived and not leaving:
                group.share_out()
                continue
            self.recorder.state.enter(State.RESIZING, f"{role}: {len(workers.arrived)} join, {len(leaving)} leave")
            donor = (stay or group.replicas)[0]
            newcomers = workers.admit()
            waits += hand_over(donor, newcomers, at[role], role == self.student)
            waits += group.form([worker for worker in workers.active if worker not in leaving])
            for worker in leaving:
                self._retire(workers, worker, list(waits))
            self._task(self._tell(workers, newcomers, leaving, list(waits)))
        return waits

    def must_pause(self) -> bool:
        """Whether a trained role's last worker has to go and nobody is there to take over."""
        for role in self.actors.groups:
            workers = self.actors.role_workers[role]
            if not workers.staying and any(self.must_go(worker) for worker in workers.active):
                return True
        return False

    def must_go(self, worker: WorkerHandle) -> bool:
        """Whether the time of a worker's node is nearly over."""
        left = float("inf") if worker.leaving is None else worker.leaving - time.time()
        return left < PAUSE + 3 * self.progress.iteration_seconds

    def admit_to_pools(self) -> None:
        """Let workers of frozen roles that have arrived take part at once: they have no state."""
        for role in self.actors.pools:
            workers = self.actors.role_workers[role]
            if self.progress.started and workers.arrived:
                self.resized(workers, joined=self.admit(workers))

    def admit(self, workers: RoleWorkers) -> list[WorkerHandle]:
        """Give those that have arrived work; return them."""
        newcomers = workers.admit()
        if (pool := self.actors.pools.get(workers.role)) is not None:
            for worker in newcomers:
                pool.add(worker)
        return newcomers

    async def _tell(
        self, workers: RoleWorkers, joined: list[WorkerHandle], left: list[WorkerHandle], after: list[ObjectRef]
    ) -> None:
        """Write a change down once newcomers have their state."""
        try:
            await asyncio.gather(*after)
        except ray.exceptions.RayError:
            joined = [worker for worker in joined if worker in workers.active]
        self.resized(workers, joined, left)
        if self.recorder.state.state == State.RESIZING:
            self.recorder.state.enter(State.RUNNING)

    def resized(
        self, workers: RoleWorkers, joined: list[WorkerHandle] | None = None, left: list[WorkerHandle] | None = None
    ) -> None:
        """Write down that a role has other workers than before."""
        facts = {"joined": [worker.number for worker in joined or []], "left": [worker.number for worker in left or []]}
        self.recorder.event(
            "resized", role=workers.role, workers=len(workers.active), **facts, iteration=self.progress.committed
        )

    def _retire(self, workers: RoleWorkers, worker: WorkerHandle, after: list[ObjectRef]) -> None:
        """Let a worker go: it ends once it has answered all its calls and others stand where it does.

        Args:
            workers: its role's.
            worker: the one that leaves.
            after: calls by which the others come to stand there. If one fails, the worker's state may be the last of
                its kind: it stays among those that leave until the run has recovered.
        """
        workers.release(worker)

        async def end() -> None:
            try:
                await asyncio.gather(*after)
            except ray.exceptions.RayError:
                return
            try:
                if (pool := self.actors.pools.get(worker.role)) is not None:
                    while pool.holds(worker):
                        await asyncio.sleep(0.05)
                else:
                    await worker.actor.progress.remote()
            except ray.exceptions.RayError:
                pass  # it is gone already
            workers.remove(worker)

        self._task(end())

    def _task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def leave_nodes(self, draining: dict[str, float]) -> None:
        """Have work leave nodes that go away; ask for as much elsewhere.

        Args:
            draining: node id to time.time() of its end; infinity: no date was given.
        """
        here = ray.get_runtime_context().get_node_id()
        if here in draining and here not in self._leaving:
            self._leaving.add(here)
            self.progress.owes_checkpoint = True
            self.recorder.say("the driver's own node goes away: a checkpoint is written, and the same command goes on")
            self.recorder.event("notice", role="driver", node=here, iteration=self.progress.committed)
        for role, workers in self.actors.role_workers.items():
            for worker in [*workers.active, *workers.arrived]:
                end = draining.get(worker.identity.node)
                if end is None or worker.leaving is not None:
                    continue
                worker.leaving = end
                seconds = None if end == float("inf") else round(end - time.time(), 3)
                self.recorder.event(
                    "notice", role=role, worker=worker.number, node=worker.identity.node, seconds_left=seconds,
                    iteration=self.progress.committed,
                )  # fmt: skip
                if worker in workers.arrived:
                    workers.remove(worker)
                workers.fill()
            if (pool := self.actors.pools.get(role)) is not None:
                self._leave_pool(workers, pool)

    def _leave_pool(self, workers: RoleWorkers, pool: ScorerPool) -> None:
        """Let a pool's workers on leaving nodes go, the last one only when another is there: it has nothing to lose."""
        leaving = [worker for worker in workers.active if worker.leaving is not None]
        stay = len(workers.active) - len(leaving)
        for worker in leaving:
            if stay:
                pool.remove(worker)
                self._retire(workers, worker, [])
                self.resized(workers, left=[worker])


def hand_over(donor: WorkerHandle, to: list[WorkerHandle], at: TrainerProgress, student: bool) -> list[ObjectRef]:
    """Have workers take the donor's state; in order with all its calls.

    Args:
        donor: who has it.
        to: who take it.
        at: where the donor will stand.
        student: whether the role holds the experts.
    """
    if not to:
        return []
    more = []
    if student:
        experts = [donor.actor.expert.remote(index) for index in range(at.phase)]
        more = [donor.actor.pairs.remote(), *experts]
    state = donor.actor.state.remote(at.updates)
    return [worker.actor.take_over.remote(at.phase, at.updates, state, *more) for worker in to]
