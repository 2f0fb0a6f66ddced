"""Keeping a run able to go on: who is lost, what that cost, and from where all go on."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
from ray import ObjectRef

from raydmd.config.recipe import Recipe
from raydmd.errors import RunError, StorageError, UserError
from raydmd.runtime.actors import TRAINERS, Cluster
from raydmd.runtime.checkpoint.queue import CheckpointQueue
from raydmd.runtime.membership.manager import Progress, Resizing, hand_over
from raydmd.runtime.membership.role_workers import Crew, Member
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import LOSSES_PER_FAILURE, Stopped, cause_of, first_own_fault, in_words, is_gone
from raydmd.runtime.recovery.helper_health import CALLER, PROMPTS, WRITER, HelperMonitor
from raydmd.runtime.workers.base import Position, Receipt
from raydmd.runtime.workers.process_group import StepDropped
from raydmd.sampling.plan import plan_phases

ANSWER = 2.0  # seconds within which a living worker answers beside its work


@dataclass
class Standing:
    """From where a run goes on.

    Attributes:
        iteration: the next one.
        fake_updates: optimizer steps of the fake score that are made.
        experts: experts that are fixed and kept, when all went back to a manifest; None: the workers' own state holds.
    """

    iteration: int
    fake_updates: int
    experts: int | None


@dataclass(eq=False)
class _Loss:
    """A lost worker, since when, what is done without it, and the iteration whose commit shows that it is mended."""

    member: Member
    since: float
    how: str = ""
    first: int = 0


@dataclass
class Elastic:
    """Mends a cluster after losses; knows nothing of the algorithm but where a step's edge is.

    Args:
        recipe: the run's recipe.
        cluster: the actors.
        recorder: told what happens.
        stopping: says whether the run is to stop, so that waiting ends.
    """

    recipe: Recipe
    cluster: Cluster
    recorder: Recorder
    stopping: Callable[[], bool]
    failures: int = 0
    rounds: int = 0
    _losses: list[_Loss] = field(default_factory=list)
    _since: float = 0.0  # when mending began
    _steps_lost: int = 0
    _how: str = ""
    _last: str = ""
    _rewinding: bool = False  # some trainers may be in the last manifest's state, and others not yet

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.resizing = Resizing(self.cluster, self.recorder, self.progress)
        self.changed = asyncio.Event()
        helpers = {WRITER: self.cluster.archivist, PROMPTS: self.cluster.prompts, CALLER: self.cluster.warden}
        self.monitor = HelperMonitor(helpers, self.recorder, self.recipe.runtime.dead_after)
        self.checkpoints = CheckpointQueue(
            self.cluster.archivist, self.monitor, self.recorder, self._checkpoint_lost, self.stopping
        )
        for crew in self.cluster.crews.values():
            crew.changed = self.changed.set
        self.cluster.scorers.lost = self.lost

    # what is lost

    def lost(self, member: Member, error: BaseException | str) -> None:
        """Write down that a worker is gone, and ask for another."""
        crew = self.cluster.crews[member.role]
        if member not in crew.everyone:
            return
        why = error if isinstance(error, str) else in_words(error)
        loss = _Loss(member, time.monotonic(), "it was leaving" if member in crew.leavers else "")
        self._losses.append(loss)
        crew.strike(member)
        if member.role == "teacher":
            self.cluster.scorers.remove(member)
            loss.how = f"{'others' if crew.members else 'a new one'} took its micro-batches"
            loss.first = self.progress.scored  # what is scored already needs no scorer
        self._last = f"{member.name}: {why}"
        self.recorder.say(f"lost {self._last}")
        self.recorder.event(
            "worker-lost", role=member.role, worker=member.number, node=member.identity.node,
            pid=member.identity.pid, why=why,
            left=len(crew.members), iteration=self.progress.committed,
        )  # fmt: skip

    def _checkpoint_lost(self) -> None:
        self.progress.owes_checkpoint = True

    def step_committed(self, iteration: int, seconds: float) -> None:
        """Write down that what was lost is mended: a step was made since."""
        self.progress.committed, self.failures, self.rounds = iteration + 1, 0, 0
        self.progress.iteration_seconds = seconds
        mended = [loss for loss in self._losses if iteration >= loss.first]
        if mended or self._how:
            self._losses = [loss for loss in self._losses if loss not in mended]
            roles = sorted({loss.member.role for loss in mended})
            since = min([loss.since for loss in mended] + ([self._since] if self._how else []))
            taken, lost, how = round(time.monotonic() - since, 3), self._steps_lost, self._how or mended[-1].how
            self.recorder.event(
                "recovered", roles=roles, workers=[loss.member.number for loss in mended], seconds=taken,
                steps_lost=lost, how=how, iteration=iteration,
            )  # fmt: skip
            self.recorder.recovered(roles, how, taken, lost)
            self.recorder.say(f"recovered after {taken:.2f} s, {lost} steps lost: {how}")
            self._steps_lost, self._how = 0, ""

    def judge(self, errors: list[BaseException]) -> None:
        """Raise an error that would only come again: the user's, or one that came too often without a step between."""
        for error in errors:
            if isinstance(cause_of(error), UserError | StorageError):
                raise cause_of(error)
            if not isinstance(error, ray.exceptions.RayError | StepDropped):
                raise error
        fault = first_own_fault(errors)
        self.rounds += 1
        last, self._last = self._last or in_words(errors[0]), ""  # nobody need be lost: a group may have failed to meet
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
            raise RunError(f"workers were lost {self.rounds} times without a step between, the last time {last}")

    def measure(self, receipts: list[Receipt]) -> None:
        """Learn trainers' speeds from an iteration's receipts, for their shares of the batch."""
        for role in TRAINERS:
            for member in self.cluster.groups[role].members:
                mine = [r for r in receipts if r.role == role and r.worker == member.number]
                busy, micros = sum(r.busy_seconds for r in mine), sum(r.micros for r in mine)
                if micros:
                    newest = micros / max(busy, 1e-9)
                    member.speed = newest if member.speed is None else member.speed + 0.2 * (newest - member.speed)
                elif member.speed is not None:
                    member.speed *= 1.01  # without a share it cannot show that it is faster now: it is tried again

    # from where to go on

    async def mend(self) -> Standing:
        """Bring the survivors to one state and the newcomers to it, or all to the last manifest.

        Raises:
            ray.exceptions.RayError: somebody was lost meanwhile; call it again.
            UserError, RunError: there are no workers.
        """
        if not self._how:
            self._since = time.monotonic()
        await self._drop_steps()
        positions = await self._positions()
        await self._staff()
        joined = {crew.role: self.resizing.let_in(crew) for crew in self.cluster.crews.values()}
        best = {}
        for role in TRAINERS:
            known = [positions[m] for m in self._with_state(role) if m in positions]
            best[role] = max(known, default=Position(-1, 0))
        generator, fake = best["generator"], best["fake"]
        if not self._rewinding and self._agree(generator, fake):
            await self._rejoin(positions, best)
            self._how = self._how or "the survivors went on"
            standing = Standing(generator.updates, fake.updates, None)
        else:
            standing = await self._rewind()
        for role, newcomers in joined.items():
            if newcomers and self.progress.standing:
                self.resizing.resized(self.cluster.crews[role], joined=newcomers)
        for role in TRAINERS:
            for member in list(self.cluster.crews[role].leavers):
                self.cluster.crews[role].strike(member)  # what it had to give, it gave
        self.progress.standing, self.progress.scored = True, standing.iteration
        for loss in self._losses:
            loss.first = min(loss.first, standing.iteration)
        return standing

    async def _drop_steps(self) -> None:
        """Free everyone who waits for a peer, and have calls of the old formation refused."""
        for role in TRAINERS:
            group, actors = self.cluster.groups[role], [member.actor for member in self._with_state(role)]
            if actors and group.formation:
                await self.cluster.warden.ask.remote(actors, "drop", (group.formation,), ANSWER)

    async def _positions(self) -> dict[Member, Position]:
        """Ask every trainer where it stands, behind all calls that it still has; strike those who do not know."""
        found: dict[Member, Position] = {}
        for member in [member for role in TRAINERS for member in self.cluster.crews[role].members]:
            if member.leaving is not None and self.resizing.must_go(member):
                self.lost(member, "its node goes away")
        asked = [member for role in TRAINERS for member in self._with_state(role)]
        answers = await asyncio.gather(*(m.actor.position.remote() for m in asked), return_exceptions=True)
        for member, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Position):
                found[member] = answer
            elif isinstance(answer, Exception) and is_gone(answer):
                self.lost(member, answer)
            elif isinstance(answer, BaseException):
                raise answer
        return found

    async def _staff(self) -> None:
        """Wait until every trained role has its min of workers, and the pool its.

        Raises:
            RunError: they did not come in time.
        """
        end = time.monotonic() + self.recipe.runtime.placement_timeout
        while short := [crew for crew in self.cluster.crews.values() if self._short(crew)]:
            for crew in short:
                if crew.failure is not None:
                    raise crew.failure
            if self.stopping():
                raise Stopped
            if time.monotonic() > end:
                words = "; ".join(f"{crew.role} has {len(crew.members)}, {crew.words()}" for crew in short)
                raise RunError(f"no worker came within {self.recipe.runtime.placement_timeout:g} s: {words}")
            self.changed.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self.changed.wait()
            except TimeoutError:
                pass

    def _short(self, crew: Crew) -> bool:
        crew.fill()
        return len(crew.members) + len(crew.arrived) < crew.settings.min_workers

    def _agree(self, generator: Position, fake: Position) -> bool:
        """Whether these two can be of one run: the fake is at most an iteration, and what is stale, ahead."""
        updates, ahead = self.recipe.method.fake_updates, 1 + self.recipe.runtime.max_staleness
        first = generator.updates * updates
        if generator.phase < 0 or fake.phase < 0:
            return False
        if generator.phase != fake.phase:
            return fake.updates == first  # at a phase's edge
        return first <= fake.updates <= first + ahead * updates

    async def _rejoin(self, positions: dict[Member, Position], best: dict[str, Position]) -> None:
        """Give those who are behind a survivor's state, and form the groups."""
        waits: list[ObjectRef] = []
        for role in TRAINERS:
            members, at = self.cluster.crews[role].members, best[role]
            behind = [member for member in members if positions.get(member) != at]
            donor = next(member for member in self._with_state(role) if positions.get(member) == at)
            waits += hand_over(donor, behind, at)
            waits += self.cluster.groups[role].form(members)
        await asyncio.gather(*waits)

    def _with_state(self, role: str) -> list[Member]:
        """Return a trained role's members, then those who are leaving it: they know the group's state, too."""
        return [*self.cluster.crews[role].members, *self.cluster.crews[role].leavers]

    async def _rewind(self) -> Standing:
        """Put every trainer into the last manifest's state; where that is cut short, it is all done again."""
        self._rewinding = True
        manifest, skipped, shards = await self.checkpoints.restore()
        for words in skipped:
            self.recorder.say(words)
        iteration, phase, experts = (manifest.iteration, manifest.phase, manifest.experts) if manifest else (0, 0, 0)
        fakes = manifest.fake_version if manifest else 0
        lost = max(0, self.progress.committed - iteration)
        if self._losses or lost:
            self._steps_lost += lost
            self._how = "all went back to the last manifest"
        self.progress.committed = iteration
        kept = [shards[f"expert-{index}"] for index in range(experts)]
        waits: list[ObjectRef] = []
        for role, updates, more in (("generator", iteration, [None, *kept]), ("fake", fakes, [])):
            members = self.cluster.crews[role].members
            if phase < len(plan_phases(self.recipe)):
                waits += [m.actor.take_over.remote(phase, updates, shards.get(role), *more) for m in members]
            waits += self.cluster.groups[role].form(members)
        await asyncio.gather(*waits)
        self._rewinding = False
        return Standing(iteration, fakes, experts)
