"""What goes on beside the loop: heartbeats, nodes that go away, arrivals in the pool, what is waited for."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from raydmd.errors import RunError
from raydmd.runtime.checkpoint.queue import STOP_PATIENCE_S
from raydmd.runtime.membership.role_workers import RoleWorkers, WorkerHandle
from raydmd.runtime.membership.unplaced import find_unplaced
from raydmd.runtime.ray_compat import draining_nodes
from raydmd.runtime.recovery.faults import Stopped, in_words, is_gone
from raydmd.runtime.recovery.helper_health import CALLER, PROMPTS, WRITER
from raydmd.runtime.recovery.manager import RecoveryManager
from raydmd.runtime.workers.base import Heartbeat

EVERY = 1.0
SAY_AFTER = 15.0


@dataclass
class HealthMonitor:
    """Looks after a run's workers once a second."""

    recovery: RecoveryManager
    _heard: dict[WorkerHandle, float] = field(default_factory=dict)
    _said: dict[str, int] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)  # when each pool was last seen to have a worker

    async def run(self) -> None:
        """Look until cancelled.

        Raises:
            Stopped: the run is to stop while it has no scorer.
            RunError: no scorer came in time.
            ray.exceptions.RayError: a role has too few workers, and they fail whenever they are started.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._every_second())
                tasks.create_task(self._check_heartbeats())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            role_workers = list(self.recovery.actors.role_workers.values())
            unplaced = (
                await asyncio.to_thread(find_unplaced, role_workers)
                if any(workers.coming for workers in role_workers)
                else {}
            )
            for workers in role_workers:
                workers.see_placed(unplaced.get(workers.role, set()))
                if workers.failure is not None:
                    raise workers.failure
                self._say_who_waits(workers)
                self._say_who_fails(workers)
            self.recovery.membership.leave_nodes(await asyncio.to_thread(draining_nodes))
            self.recovery.membership.admit_to_pools()
            self._give_up_waiting()
            self._leave_silent_helpers()

    def _leave_silent_helpers(self) -> None:
        """Stop a run that is to stop without the helper that its iteration would wait for."""
        silent = max(self.recovery.monitor.silent_s(name) for name in (PROMPTS, CALLER))
        if self.recovery.stopping() and silent > STOP_PATIENCE_S:
            raise Stopped

    def _give_up_waiting(self) -> None:
        """End a run that has waited for a worker of a frozen role for too long, or is to stop meanwhile."""
        limit = self.recovery.recipe.runtime.placement_timeout
        for role in self.recovery.actors.pools:
            workers, now = self.recovery.actors.role_workers[role], time.monotonic()
            if workers.active or not self.recovery.progress.started:
                self._since[role] = now
            elif self.recovery.stopping():
                raise Stopped
            elif now - self._since.setdefault(role, now) > limit:
                raise RunError(f"no {role} came within {limit:g} s: {workers.words()}")

    async def _check_heartbeats(self) -> None:
        """Treat as dead who has not answered, or been in one call, for too long."""
        limit = self.recovery.recipe.runtime.dead_after
        while True:
            role_workers = self.recovery.actors.role_workers.values()
            workers = [worker for workers in role_workers for worker in workers.everyone]
            if (heartbeats := await self._ask([worker.actor for worker in workers])) is None:
                self._heard.clear()  # nobody was asked
            else:
                for worker, heartbeat in zip(workers, heartbeats, strict=True):
                    self._check(worker, heartbeat, limit)
                self._heard = {worker: when for worker, when in self._heard.items() if worker in workers}
            await asyncio.sleep(EVERY)

    async def _ask(self, actors: list[Any]) -> list[Any] | None:
        """Return workers' heartbeats, and take note of helpers' heartbeats; None: the control caller was lost.

        It asks for both, for a call of the driver's own to a helper waits behind those whose arguments are to come.
        """
        run, monitor = self.recovery.actors, self.recovery.monitor
        helpers = {WRITER: run.checkpoint_writer, PROMPTS: run.prompts}
        answers = asyncio.gather(
            run.control_caller.heartbeat.remote(),
            run.control_caller.ask.remote(list(helpers.values()), "heartbeat", (), EVERY),
            run.control_caller.ask.remote(actors, "heartbeat", (), EVERY),
        )
        answers.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to look
        while not (await asyncio.wait((answers,), timeout=2 * EVERY))[0]:
            monitor.heard(CALLER, TimeoutError())
        try:
            own, beats, heartbeats = answers.result()
        except ray.exceptions.RayError as error:
            monitor.heard(CALLER, error)
            return None
        was_lost = monitor.is_lost(CALLER)
        monitor.heard(CALLER, own)
        if was_lost:  # its answers are of long ago, or nobody had the time to give one
            return None
        for name, beat in zip(helpers, beats, strict=True):
            monitor.heard(name, beat)
        return list(heartbeats)

    def _check(self, worker: WorkerHandle, heartbeat: Any, limit: float) -> None:
        now = time.monotonic()
        if isinstance(heartbeat, Heartbeat):
            self._heard[worker], worker.heartbeat = now, (heartbeat, now)
            if heartbeat.seconds > limit and not heartbeat.waiting:
                self.recovery.lost(worker, f"in one call ({heartbeat.method}) for over {limit:g} s")
        elif is_gone(heartbeat) and not isinstance(heartbeat, ActorUnavailableError):
            self.recovery.lost(worker, heartbeat)
        elif now - self._heard.setdefault(worker, now) > limit:
            self.recovery.lost(worker, f"did not answer for over {limit:g} s")

    def _say_who_waits(self, workers: RoleWorkers) -> None:
        """Tell which role waits for what, once for each number of workers."""
        since, count = workers.waiting_since(), len(workers.unplaced)
        self.recovery.recorder.exported.waiting(workers.role, count)
        if since is None or not count or time.monotonic() - since < SAY_AFTER or not workers.active:
            self._said.pop(workers.role, None) if since is None else None
            return
        if self._said.get(workers.role) != count:
            self._said[workers.role] = count
            recorder = self.recovery.recorder
            recorder.say(f"going on without: {workers.words()}")
            recorder.event("waiting", role=workers.role, workers=count, asks=workers.asks)

    def _say_who_fails(self, workers: RoleWorkers) -> None:
        """Tell of workers that a role can do without and that fail whenever they are started."""
        error, workers.trouble = workers.trouble, None
        if error is not None:
            why, recorder = in_words(error), self.recovery.recorder
            recorder.say(f"going on without: a {workers.role} worker does not start: {why}")
            recorder.event("start-failed", role=workers.role, why=why)
