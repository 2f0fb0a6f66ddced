"""Keeping a run able to go on: who is lost, what that cost, and from where all go on."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
from ray import ObjectRef

from raydmd.config.recipe import Recipe
from raydmd.errors import RunError, StorageError, UserError
from raydmd.methods.program import MethodTrace
from raydmd.runtime.actors import RunActors
from raydmd.runtime.checkpoint.queue import CheckpointQueue
from raydmd.runtime.membership.manager import MembershipManager, Progress, hand_over
from raydmd.runtime.membership.role_workers import RoleWorkers, WorkerHandle
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import LOSSES_PER_FAILURE, Stopped, cause_of, first_own_fault, in_words, is_gone
from raydmd.runtime.recovery.helper_health import CALLER, PROMPTS, WRITER, HelperMonitor
from raydmd.runtime.recovery.state import State
from raydmd.runtime.workers.base import CallStats, TrainerProgress
from raydmd.runtime.workers.process_group import StepDropped

HOW = {  # a recovery's code to what is shown of it
    "rescheduled": "other workers took its micro-batches",
    "reformed": "the survivors went on",
    "rolled_back": "all went back to the last manifest",
    "drained": "it was leaving",
}
ANSWER = 2.0  # seconds within which a living worker answers beside its work


@dataclass
class ResumePoint:
    """From where a run goes on.

    Attributes:
        iteration: the next one.
        updates: optimizer steps that are made, by trained role.
        experts: experts that are fixed and kept, when all went back to a manifest; None: the workers' own state holds.
    """

    iteration: int
    updates: dict[str, int]
    experts: int | None


@dataclass(eq=False)
class _Loss:
    """A lost worker, since when, what is done without it, and the iteration whose commit shows the recovery."""

    worker: WorkerHandle
    since: float
    how: str = ""
    first: int = 0


@dataclass
class RecoveryManager:
    """Recovers a run after losses; knows nothing of the method but its roles' updates.

    Args:
        recipe: the run's recipe.
        trace: what its method does.
        actors: the run's actors.
        recorder: told what happens.
        stopping: says whether the run is to stop, so that waiting ends.
    """

    recipe: Recipe
    trace: MethodTrace
    actors: RunActors
    recorder: Recorder
    stopping: Callable[[], bool]
    failures: int = 0
    rounds: int = 0
    _losses: list[_Loss] = field(default_factory=list)
    _since: float = 0.0  # when recovery began
    _steps_lost: int = 0
    _how: str = ""
    _last: str = ""  # what was lost since the last round
    _last_worker: str = ""  # the last worker that was lost since a step, and why
    _rewinding: bool = False  # some trainers may be in the last manifest's state, and others not yet

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.membership = MembershipManager(self.actors, self.recorder, self.progress, self.trace.method.student)
        self.changed = asyncio.Event()
        helpers = {
            WRITER: self.actors.checkpoint_writer,
            PROMPTS: self.actors.prompts,
            CALLER: self.actors.control_caller,
        }
        self.monitor = HelperMonitor(helpers, self.recorder, self.recipe.runtime.dead_after)
        self.checkpoints = CheckpointQueue(
            self.actors.checkpoint_writer, self.monitor, self.recorder, self._checkpoint_lost, self.stopping
        )
        for workers in self.actors.role_workers.values():
            workers.changed = self.changed.set
        for pool in self.actors.pools.values():
            pool.lost = self.lost

    # what is lost

    def lost(self, worker: WorkerHandle, error: BaseException | str) -> None:
        """Write down that a worker is gone, and ask for another."""
        workers = self.actors.role_workers[worker.role]
        if worker not in workers.everyone:
            return
        why = error if isinstance(error, str) else in_words(error)
        loss = _Loss(worker, time.monotonic(), "drained" if worker in workers.leaving else "")
        self._losses.append(loss)
        workers.remove(worker)
        if (pool := self.actors.pools.get(worker.role)) is not None:
            pool.remove(worker)
            loss.how = "rescheduled"
            loss.first = self.progress.scored  # what is scored already needs no scorer
        self._last = self._last_worker = f"{worker.name}: {why}"
        self.recorder.say(f"lost {self._last}")
        self.recorder.event(
            "worker-lost", role=worker.role, worker=worker.number, node=worker.identity.node,
            pid=worker.identity.pid, why=why,
            left=len(workers.active), iteration=self.progress.committed,
        )  # fmt: skip

    def _checkpoint_lost(self) -> None:
        self.progress.owes_checkpoint = True

    def step_committed(self, iteration: int, seconds: float) -> None:
        """Write down that the run has recovered: a step was made since."""
        self.progress.committed, self.failures, self.rounds, self._last_worker = iteration + 1, 0, 0, ""
        self.progress.iteration_seconds = seconds
        recovered = [loss for loss in self._losses if iteration >= loss.first]
        if recovered or self._how:
            self._losses = [loss for loss in self._losses if loss not in recovered]
            roles = sorted({loss.worker.role for loss in recovered})
            since = min([loss.since for loss in recovered] + ([self._since] if self._how else []))
            taken, lost, how = round(time.monotonic() - since, 3), self._steps_lost, self._how or recovered[-1].how
            self.recorder.event(
                "recovered", roles=roles, workers=[loss.worker.number for loss in recovered], seconds=taken,
                steps_lost=lost, how=how, iteration=iteration,
            )  # fmt: skip
            self.recorder.recovered(roles, how, taken, lost)
            self.recorder.say(f"recovered after {taken:.2f} s, {lost} steps lost: {HOW[how]}")
            self._steps_lost, self._how = 0, ""

    def check_errors(self, errors: list[BaseException]) -> None:
        """Raise an error that would only come again: the user's, or one that came too often without a step between."""
        for error in errors:
            if isinstance(cause_of(error), UserError | StorageError):
                raise cause_of(error)
            if not isinstance(error, ray.exceptions.RayError | StepDropped):
                raise error
        fault = first_own_fault(errors)
        self.rounds += 1
        last, self._last = self._last or in_words(errors[0]), ""  # nobody need be lost: a group may have failed to meet
        if self.progress.started:
            self.recorder.state.enter(State.RECOVERING, last)
        if fault is not None:
            self.failures += 1
            self.recorder.event(
                "failed", why=str(cause_of(fault)).strip()[:300], tries=self.failures, iteration=self.progress.committed
            )
        most = self.recipe.runtime.max_failures
        if self.failures >= most:
            assert fault is not None
            raise fault
        if self.rounds >= LOSSES_PER_FAILURE * most:
            last = self._last_worker or last  # a death may be heard of twice, and its worker is removed once
            raise RunError(f"workers were lost {self.rounds} times without a step between, the last time {last}")

    def measure(self, call_stats: list[CallStats]) -> None:
        """Learn trainers' speeds from an iteration's statistics, for their shares of the batch."""
        for role, group in self.actors.groups.items():
            for worker in group.replicas:
                mine = [r for r in call_stats if r.role == role and r.worker == worker.number]
                busy, micros = sum(r.busy_seconds for r in mine), sum(r.micros for r in mine)
                if micros:
                    newest = micros / max(busy, 1e-9)
                    worker.speed = newest if worker.speed is None else worker.speed + 0.2 * (newest - worker.speed)
                elif worker.speed is not None:
                    worker.speed *= 1.01  # without a share it cannot show that it is faster now: it is tried again

    # from where to go on

    async def recover(self) -> ResumePoint:
        """Bring the survivors to one state and the newcomers to it, or all to the last manifest.

        Raises:
            ray.exceptions.RayError: somebody was lost meanwhile; call it again.
            UserError, RunError: there are no workers.
        """
        if not self._how:
            self._since = time.monotonic()
        await self._drop_steps()
        progress_of = await self._ask_progress()
        await self._staff()
        joined = {workers.role: self.membership.admit(workers) for workers in self.actors.role_workers.values()}
        best = {}
        for role in self.actors.groups:
            known = [progress_of[m] for m in self._with_state(role) if m in progress_of]
            best[role] = max(known, default=TrainerProgress(-1, 0))
        if not self._rewinding and self._agree(best):
            await self._rejoin(progress_of, best)
            self._how = self._how or "reformed"
            updates = {role: progress.updates for role, progress in best.items()}
            resume_point = ResumePoint(self.trace.complete(updates), updates, None)
        else:
            resume_point = await self._rewind()
        for role, newcomers in joined.items():
            if newcomers and self.progress.started:
                self.membership.resized(self.actors.role_workers[role], joined=newcomers)
        for role in self.actors.groups:
            for worker in list(self.actors.role_workers[role].leaving):
                self.actors.role_workers[role].remove(worker)  # what it had to give, it gave
        self.progress.started, self.progress.scored = True, resume_point.iteration
        for loss in self._losses:
            loss.first = min(loss.first, resume_point.iteration)
        self.recorder.state.enter(State.RUNNING)
        return resume_point

    async def _drop_steps(self) -> None:
        """Free everyone who waits for a peer, and have calls of the old generation refused."""
        for role, group in self.actors.groups.items():
            actors = [worker.actor for worker in self._with_state(role)]
            if actors and group.generation:
                await self.actors.control_caller.ask.remote(actors, "drop", (group.generation,), ANSWER)

    async def _ask_progress(self) -> dict[WorkerHandle, TrainerProgress]:
        """Ask every trainer where it stands, behind all calls that it still has; remove those who do not know."""
        found: dict[WorkerHandle, TrainerProgress] = {}
        for worker in [worker for role in self.actors.groups for worker in self.actors.role_workers[role].active]:
            if worker.leaving is not None and self.membership.must_go(worker):
                self.lost(worker, "its node goes away")
        asked = [worker for role in self.actors.groups for worker in self._with_state(role)]
        answers = await asyncio.gather(*(m.actor.progress.remote() for m in asked), return_exceptions=True)
        for worker, answer in zip(asked, answers, strict=True):
            if isinstance(answer, TrainerProgress):
                found[worker] = answer
            elif isinstance(answer, Exception) and is_gone(answer):
                self.lost(worker, answer)
            elif isinstance(answer, BaseException):
                raise answer
        return found

    async def _staff(self) -> None:
        """Wait until every trained role has its min of workers, and the pool its.

        Raises:
            RunError: they did not come in time.
        """
        end = time.monotonic() + self.recipe.runtime.placement_timeout
        while short := [workers for workers in self.actors.role_workers.values() if self._short(workers)]:
            for workers in short:
                if workers.failure is not None:
                    raise workers.failure
            if self.stopping():
                raise Stopped
            if time.monotonic() > end:
                words = "; ".join(f"{workers.role} has {len(workers.active)}, {workers.words()}" for workers in short)
                raise RunError(f"no worker came within {self.recipe.runtime.placement_timeout:g} s: {words}")
            self.changed.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self.changed.wait()
            except TimeoutError:
                pass

    def _short(self, workers: RoleWorkers) -> bool:
        workers.fill()
        return len(workers.active) + len(workers.arrived) < workers.settings.min_workers

    def _agree(self, best: dict[str, TrainerProgress]) -> bool:
        """Whether the trained roles can be of one run, and go on as they are."""
        phases = {progress.phase for progress in best.values()}
        updates = {role: progress.updates for role, progress in best.items()}
        if min(phases) < 0:
            return False
        if len(phases) > 1:  # at a phase's edge
            return updates == self.trace.updates_before(self.trace.complete(updates))
        return self.trace.consistent(updates, self.recipe.runtime.max_staleness)

    async def _rejoin(self, progress_of: dict[WorkerHandle, TrainerProgress], best: dict[str, TrainerProgress]) -> None:
        """Give those who are behind a survivor's state, and form the groups."""
        waits: list[ObjectRef] = []
        for role, group in self.actors.groups.items():
            workers, at = self.actors.role_workers[role].active, best[role]
            behind = [worker for worker in workers if progress_of.get(worker) != at]
            donor = next(worker for worker in self._with_state(role) if progress_of.get(worker) == at)
            waits += hand_over(donor, behind, at, role == self.trace.method.student)
            waits += group.form(workers)
        await asyncio.gather(*waits)

    def _with_state(self, role: str) -> list[WorkerHandle]:
        """Return a trained role's workers, then those that are leaving it: they know the group's state, too."""
        return [*self.actors.role_workers[role].active, *self.actors.role_workers[role].leaving]

    async def _rewind(self) -> ResumePoint:
        """Put every trainer into the last manifest's state; where that is cut short, it is all done again."""
        self._rewinding = True
        if self.progress.started:
            self.recorder.state.enter(State.REWINDING)
        manifest, skipped, shards = await self.checkpoints.restore()
        for words in skipped:
            self.recorder.say(words)
        iteration, phase, experts = (manifest.iteration, manifest.phase, manifest.experts) if manifest else (0, 0, 0)
        updates = manifest.updates if manifest else self.trace.updates_before(0)
        lost = max(0, self.progress.committed - iteration)
        if self._losses or lost:
            self._steps_lost += lost
            self._how = "rolled_back"
        self.progress.committed = iteration
        kept = [shards[f"expert-{index}"] for index in range(experts)]
        waits: list[ObjectRef] = []
        for role, group in self.actors.groups.items():
            workers = self.actors.role_workers[role].active
            more = [None, *kept] if role == self.trace.method.student else []
            if phase < len(self.trace.phases):
                waits += [m.actor.take_over.remote(phase, updates[role], shards.get(role), *more) for m in workers]
            waits += group.form(workers)
        await asyncio.gather(*waits)
        self._rewinding = False
        return ResumePoint(iteration, dict(updates), experts)
