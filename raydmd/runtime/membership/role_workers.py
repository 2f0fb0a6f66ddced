"""A role's workers: how many are at work, on their way or leaving, between the recipe's min and max."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from raydmd.config.recipe import Recipe
from raydmd.errors import RunError, UserError
from raydmd.methods.registry import build_method
from raydmd.runtime.membership.placement import actor_options, describe, worker_device
from raydmd.runtime.membership.start_patience import StartPatience
from raydmd.runtime.recovery.faults import cause_of
from raydmd.runtime.workers.base import Factory, Heartbeat, Identity, worker_type
from raydmd.runtime.workers.helpers import BESIDE

AGAIN = 1.0  # seconds until a worker that failed while starting is asked for again; doubles each time...
RARELY = 600.0  # ...up to this


@dataclass(eq=False)
class WorkerHandle:
    """A worker that is up.

    Attributes:
        role: its role.
        number: unique among all workers of the role in this run.
        actor: its handle.
        identity: where it lives.
        speed: micro-batches a busy second, as measured; None before.
        leaving: time.time() by which its node goes away; None: it does not; infinity: no date was given.
        heartbeat: the last, and time.monotonic() when it was heard; None: none was.
    """

    role: str
    number: int
    actor: Any
    identity: Identity
    speed: float | None = None
    leaving: float | None = None
    heartbeat: tuple[Heartbeat, float] | None = None

    @property
    def name(self) -> str:
        """What it is called in events."""
        return f"{self.role} {self.number}"


@dataclass(eq=False)
class RoleWorkers:
    """The workers of one role.

    Whenever fewer than the role's max are at work or on their way, more are asked for: Ray's autoscaler sees the
    actors that wait. Those that come up are found in ``arrived`` until someone takes them in with `admit`; those that
    are to go are found in ``leaving`` until they have done their last work.

    Args:
        role: its name.
        recipe: the run's recipe.
        part: what builds the role's part; default: as the recipe's method has it.
        changed: called when somebody has arrived or a start has failed for good.
        failure: why workers fail whenever they are started, where the role has fewer than its min.
        trouble: why they do, where it has its min and goes on; whoever tells of it sets it to None.
        row: the conditions of one row of prompts, on which each worker tries its network; None: none does.
    """

    role: str
    recipe: Recipe
    part: Factory | None = None
    changed: Callable[[], None] = lambda: None
    active: list[WorkerHandle] = field(default_factory=list)
    arrived: list[WorkerHandle] = field(default_factory=list)
    leaving: list[WorkerHandle] = field(default_factory=list)
    failure: BaseException | None = None
    trouble: BaseException | None = None
    row: Any = None

    def __post_init__(self) -> None:
        self.settings = self.recipe.runtime.of(self.role)
        self.asks = describe(self.settings)
        remote: Any = ray.remote  # its types do not know of concurrency groups
        self._kind = remote(concurrency_groups={BESIDE: 1})(worker_type(build_method(self.recipe), self.role))
        self._numbers = 0
        self._coming: dict[Any, asyncio.Task[None]] = {}
        self._since: dict[Any, float] = {}
        self._placed: dict[Any, float] = {}  # those that Ray does not lack room for, since when
        self._patience = StartPatience(self.recipe.runtime.placement_timeout, self.recipe.runtime.dead_after)
        self._needed = True  # at the last failed start
        self._failed_starts, self._pause = 0, AGAIN  # in a row
        self._begun = self._closed = False  # whether one has ever been up

    @property
    def staying(self) -> list[WorkerHandle]:
        """Those at work, and those that will be, whose node does not go away."""
        return [worker for worker in (*self.active, *self.arrived) if worker.leaving is None]

    @property
    def everyone(self) -> list[WorkerHandle]:
        """All that are up."""
        return [*self.active, *self.arrived, *self.leaving]

    @property
    def coming(self) -> list[Any]:
        """Handles of workers that are not up yet."""
        return list(self._coming)

    @property
    def unplaced(self) -> list[Any]:
        """Those of them that Ray was last seen to have no room for; the others are starting."""
        return [actor for actor in self._coming if actor not in self._placed]

    def waiting_since(self) -> float | None:
        """Return since when (time.monotonic) a worker has been waited for, if one is."""
        return min(self._since.values(), default=None)

    def words(self) -> str:
        """Say who is on the way, and what they wait for."""
        waiting = len(self.unplaced)
        starting = len(self._coming) - waiting
        parts = [f"{waiting} {self.role} worker(s) wait for {self.asks} each"] if waiting else []
        return "; ".join(parts + ([f"{starting} {self.role} worker(s) are starting"] if starting else []))

    def see_placed(self, unplaced: set[Any]) -> None:
        """Take note of which workers Ray has no room for; start those again that have been starting for too long."""
        now, runtime = time.monotonic(), self.recipe.runtime
        for actor in unplaced:
            self._placed.pop(actor, None)
        limit = self._patience.seconds
        starting = [actor for actor in self._coming if actor not in unplaced]
        if stuck := [actor for actor in starting if now - self._placed.setdefault(actor, now) > limit]:
            self._patience.gave_up()
        for actor in stuck:
            self._coming[actor].cancel()
            self._forget(actor)
            ray.kill(actor)
            self._failed_starts += 1
            self.trouble = RunError(f"it was starting for over {limit:g} s, and is started again")
            if self._failed_starts >= runtime.max_failures and self._is_short():
                self.failure = RunError(f"{self.role}: its workers do not come up within {limit:g} s")
                self.changed()
            else:
                self.fill()

    def fill(self) -> None:
        """Request workers until the role has its max of those that stay."""
        while not self._closed and len(self.staying) + len(self._coming) < self.settings.max_workers:
            self._ask()

    def admit(self) -> list[WorkerHandle]:
        """Give those that have arrived work; return them."""
        newcomers, self.arrived = self.arrived, []
        self.active += newcomers
        return newcomers

    def release(self, worker: WorkerHandle) -> None:
        """Give a worker no more work; what it has, it may finish."""
        self.active.remove(worker)
        self.leaving.append(worker)

    def remove(self, worker: WorkerHandle) -> None:
        """Take out a worker that is dead or has left, make sure that it is, and ask for another."""
        for group in (self.active, self.arrived, self.leaving):
            if worker in group:
                group.remove(worker)
        ray.kill(worker.actor)
        self.fill()

    def close(self) -> None:
        """End all workers, and ask for no more."""
        self._closed = True
        for task in self._coming.values():
            task.cancel()
        for actor in (*self._coming, *(worker.actor for worker in self.everyone)):
            ray.kill(actor)

    def _ask(self) -> None:
        number, self._numbers = self._numbers, self._numbers + 1
        settings, runtime = self.settings, self.recipe.runtime
        actor = self._kind.options(**actor_options(settings)).remote(
            self.role, self.recipe, number, settings.threads, worker_device(settings, runtime.device), self.part
        )
        self._since[actor] = time.monotonic()
        self._placed[actor] = self._since[actor]  # until Ray says that it has no room
        self._coming[actor] = asyncio.create_task(self._receive(actor, number))

    async def _receive(self, actor: Any, number: int) -> None:
        """Wait for a worker to be up; if it fails at that, ask for another; for ever only where there are enough."""
        try:
            while True:
                try:
                    identity = await actor.ready.remote(self.row)
                    break
                except ActorUnavailableError:
                    await asyncio.sleep(AGAIN)
        except RayError as error:
            self._forget(actor)
            ray.kill(actor)
            needed = self._is_short()
            if not self._begun and isinstance(cause_of(error), UserError | RunError):
                self.failure = error  # it does not fit: the next would say the same
                self.changed()
                return
            if needed != self._needed:
                self._needed, self._failed_starts, self._pause = needed, 0, AGAIN
            pause = self._pause
            if not (isinstance(error, ActorDiedError) and error.preempted):
                self._failed_starts += 1
                self._pause = min(2 * pause, RARELY)
            if self._failed_starts >= self.recipe.runtime.max_failures:
                if needed:
                    self.failure = error
                    self.changed()
                    return
                self.trouble = error
            await asyncio.sleep(pause)
            self.fill()
            return
        self._patience.came_up(time.monotonic() - self._placed.get(actor, time.monotonic()))
        self._forget(actor)
        self._begun = True
        self._failed_starts, self._pause = 0, AGAIN
        self.arrived.append(WorkerHandle(self.role, number, actor, identity))
        self.changed()

    def _is_short(self) -> bool:
        return len(self.active) + len(self.arrived) < self.settings.min_workers

    def _forget(self, actor: Any) -> None:
        del self._coming[actor], self._since[actor]
        self._placed.pop(actor, None)
