"""Keeping a run able to go on: who is lost, who comes, who must leave, and from where all go on."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef

from raydmd.config import Recipe
from raydmd.errors import RunError, UserError
from raydmd.runtime.crew import Crew, Member
from raydmd.runtime.faults import cause_of, first_own_fault, in_words, is_gone
from raydmd.runtime.groups import TrainerGroup
from raydmd.runtime.pool import ScorerPool
from raydmd.runtime.process_group import StepDropped
from raydmd.runtime.recorder import Recorder
from raydmd.runtime.workers import Position, Receipt

TRAINERS = ("generator", "fake")
LOSSES_PER_FAILURE = 4  # rounds of losses without a step that are borne, for each failure that is
PAUSE = 5.0  # seconds before its node goes away at which a role's last worker stops at the latest


@dataclass
class Cluster:
    """Every actor of a run: the roles' crews, how they are called, and the run's helpers."""

    crews: dict[str, Crew]
    generators: TrainerGroup
    fakes: TrainerGroup
    scorers: ScorerPool
    prompts: Any
    archivist: Any
    warden: Any

    @property
    def groups(self) -> dict[str, TrainerGroup]:
        """The trained roles' groups."""
        return {"generator": self.generators, "fake": self.fakes}

    @property
    def sizes(self) -> dict[str, int]:
        """Workers at work, by role."""
        return {role: len(self.crews[role].members) for role in ("teacher", "fake", "generator")}

    def close(self) -> None:
        """End every actor, so that the run holds nothing of a cluster that others use."""
        for crew in self.crews.values():
            crew.close()
        for actor in (self.prompts, self.archivist, self.warden):
            ray.kill(actor)


class Stopped(Exception):
    """The run was asked to stop while it waited for workers."""


@dataclass
class Standing:
    """From where a run goes on.

    Attributes:
        iteration: the next one.
        fake_updates: optimizer steps of the fake score that are made.
        experts: experts that are fixed and kept; None: as many as before.
        pairs: whether the generators have the regression's pairs.
        rewound: whether it is a manifest's state, and not the workers' own.
    """

    iteration: int
    fake_updates: int
    experts: int | None
    pairs: bool
    rewound: bool


@dataclass
class Elastic:
    """Mends a cluster and lets it grow and shrink; knows nothing of the algorithm but where a step's edge is.

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
    committed: int = 0
    iteration_seconds: float = 0.0
    failures: int = 0
    rounds: int = 0
    standing: bool = False  # all were of one state once
    owes_checkpoint: bool = False
    _losses: list[dict[str, Any]] = field(default_factory=list)
    _since: float = 0.0
    _steps_lost: int = 0
    _how: str = ""
    _last: str = ""
    _leaving: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.changed = asyncio.Event()
        for crew in self.cluster.crews.values():
            crew.changed = self.changed.set
        self.cluster.scorers.lost = self.lost

    # what is lost

    def lost(self, member: Member, error: BaseException | str) -> None:
        """Write down that a worker is gone, and ask for another."""
        crew = self.cluster.crews[member.role]
        if member not in (*crew.members, *crew.arrived):
            return
        why = error if isinstance(error, str) else in_words(error)
        if not self._losses:
            self._since = time.monotonic()
        self._losses.append({"role": member.role, "worker": member.number})
        if member.role == "teacher":
            self.cluster.scorers.remove(member)
            self._how = self._how or "others took its micro-batches"
        crew.strike(member)
        self._last = f"{member.name}: {why}"
        self.recorder.say(f"lost {self._last}")
        self.recorder.event(
            "worker-lost", role=member.role, worker=member.number, node=member.identity.node, why=why,
            left=len(crew.members), iteration=self.committed,
        )  # fmt: skip

    def step_committed(self, iteration: int, seconds: float) -> None:
        """Write down that what was lost is mended: a step was made since."""
        self.committed, self.failures, self.rounds = iteration + 1, 0, 0
        self.iteration_seconds = seconds
        if self._losses or self._how:
            roles = sorted({loss["role"] for loss in self._losses})
            taken, lost = round(time.monotonic() - self._since, 3), self._steps_lost
            self.recorder.event(
                "recovered", roles=roles, workers=[loss["worker"] for loss in self._losses], seconds=taken,
                steps_lost=lost, how=self._how, iteration=iteration,
            )  # fmt: skip
            self.recorder.recovered(roles, self._how, taken, lost)
            self.recorder.say(f"recovered after {taken:.2f} s, {lost} steps lost: {self._how}")
            self._losses, self._steps_lost, self._how = [], 0, ""

    def judge(self, errors: list[BaseException]) -> None:
        """Raise an error that would only come again: the user's, or one that came too often without a step between."""
        for error in errors:
            if isinstance(cause_of(error), UserError):
                raise cause_of(error)
            if not isinstance(error, ray.exceptions.RayError | StepDropped):
                raise error
        fault = first_own_fault(errors)
        self.rounds += 1
        if fault is not None:
            self.failures += 1
            self.recorder.event(
                "failed", why=str(cause_of(fault)).strip()[:300], tries=self.failures, iteration=self.committed
            )
        most = self.recipe.runtime.max_failures
        if self.failures >= most:
            assert fault is not None
            raise fault
        if self.rounds >= LOSSES_PER_FAILURE * most:
            raise RunError(f"workers were lost {self.rounds} times without a step between, the last time {self._last}")

    def measure(self, receipts: list[Receipt]) -> None:
        """Learn trainers' speeds from an iteration's receipts, for their shares of the batch."""
        for role in TRAINERS:
            for member in self.cluster.groups[role].members:
                mine = [r for r in receipts if r.role == role and r.worker == member.number]
                busy, micros = sum(r.busy_seconds for r in mine), sum(r.micros for r in mine)
                if micros:
                    newest = micros / max(busy, 1e-9)
                    member.speed = newest if member.speed is None else member.speed + 0.2 * (newest - member.speed)

    # from where to go on

    async def mend(self) -> Standing:
        """Bring the survivors to one state and the newcomers to it, or all to the last manifest.

        Raises:
            ray.exceptions.RayError: somebody was lost meanwhile; call it again.
            UserError, RunError: there are no workers.
        """
        if not self._since or not (self._losses or self._how):
            self._since = time.monotonic()
        await self._drop_steps()
        positions = await self._positions()
        await self._staff()
        for crew in self.cluster.crews.values():
            self._let_in(crew)
        best = {}
        for role in TRAINERS:
            members = self.cluster.crews[role].members
            best[role] = max((positions.get(m, Position(-1, 0)) for m in members), default=Position(-1, 0))
        generator, fake = best["generator"], best["fake"]
        if self._agree(generator, fake):
            await self._rejoin(positions, best)
            self._how = self._how or "the survivors went on"
            standing = Standing(generator.updates, fake.updates, None, True, False)
        else:
            standing = await self._rewind()
        self.standing = True
        return standing

    async def _drop_steps(self) -> None:
        """Free everyone who waits for a peer, and have calls of the old formation refused."""
        for role in TRAINERS:
            group, members = self.cluster.groups[role], self.cluster.crews[role].members
            if members and group.formation:
                actors = [member.actor for member in members]
                await self.cluster.warden.ask.remote(actors, "drop", (group.formation,), 5.0)

    async def _positions(self) -> dict[Member, Position]:
        """Ask every trainer where it stands, behind all calls that it still has; strike those who do not know."""
        found: dict[Member, Position] = {}
        members = [member for role in TRAINERS for member in self.cluster.crews[role].members]
        for member in list(members):
            if member.leaving is not None and self._must_go(member):
                self.lost(member, "its node goes away")
                members.remove(member)
        answers = await asyncio.gather(*(m.actor.position.remote() for m in members), return_exceptions=True)
        for member, answer in zip(members, answers, strict=True):
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
                words = "; ".join(f"{crew.role} has {len(crew.members)} and waits for {crew.asks}" for crew in short)
                raise RunError(f"no worker came within {self.recipe.runtime.placement_timeout:g} s: {words}")
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), 1.0)
            except TimeoutError:
                pass

    def _short(self, crew: Crew) -> bool:
        crew.fill()
        return len(crew.members) + len(crew.arrived) < crew.settings.min_workers

    def _agree(self, generator: Position, fake: Position) -> bool:
        """Whether these two can be of one run: the fake is between the generator's version and the next."""
        first = generator.updates * self.recipe.method.fake_updates
        if generator.phase < 0 or fake.phase < 0:
            return False
        if generator.phase != fake.phase:
            return fake.updates == first  # at a phase's edge
        return first <= fake.updates <= first + self.recipe.method.fake_updates

    async def _rejoin(self, positions: dict[Member, Position], best: dict[str, Position]) -> None:
        """Give those who are behind a survivor's state, and form the groups."""
        waits: list[ObjectRef] = []
        for role in TRAINERS:
            members, at = self.cluster.crews[role].members, best[role]
            behind = [member for member in members if positions.get(member) != at]
            donor = next(member for member in members if member not in behind)
            waits += self._hand_over(donor, behind, at)
            waits += self.cluster.groups[role].form(members)
        await asyncio.gather(*waits)

    def _hand_over(self, donor: Member, to: list[Member], at: Position) -> list[ObjectRef]:
        """Have members stand where the donor does; in order with all its calls."""
        if not to:
            return []
        more = []
        if donor.role == "generator":
            experts = [donor.actor.expert.remote(index) for index in range(at.phase)]
            more = [donor.actor.pairs.remote(), *experts]
        state = donor.actor.state.remote(at.updates)
        return [member.actor.take_over.remote(at.phase, at.updates, state, *more) for member in to]

    async def _rewind(self) -> Standing:
        """Put every trainer into the last manifest's state."""
        manifest, skipped, shards = await self.cluster.archivist.restore.remote()
        for words in skipped:
            self.recorder.say(words)
        iteration, phase, experts = (manifest.iteration, manifest.phase, manifest.experts) if manifest else (0, 0, 0)
        fakes = iteration * self.recipe.method.fake_updates
        kept = [shards[f"expert-{index}"] for index in range(experts)]
        waits: list[ObjectRef] = []
        for role, updates, more in (("generator", iteration, [None, *kept]), ("fake", fakes, [])):
            members = self.cluster.crews[role].members
            if phase < self._phases():
                waits += [m.actor.take_over.remote(phase, updates, shards.get(role), *more) for m in members]
            waits += self.cluster.groups[role].form(members)
        await asyncio.gather(*waits)
        lost = max(0, self.committed - iteration)
        if self._losses or lost:
            self._steps_lost += lost
            self._how = "all went back to the last manifest"
        self.committed = iteration
        return Standing(iteration, fakes, experts, False, True)

    def _phases(self) -> int:
        from raydmd.methods.plan import plan_phases

        return len(plan_phases(self.recipe))

    # who comes and who leaves

    def edge(self, at: dict[str, Position]) -> list[ObjectRef]:
        """Between two iterations, let newcomers in and leavers out; return references to what that takes.

        Args:
            at: where each trained role stands once all calls made so far have run.
        """
        waits: list[ObjectRef] = []
        for role in TRAINERS:
            crew, group = self.cluster.crews[role], self.cluster.groups[role]
            leavers = [member for member in group.members if member.leaving is not None]
            stay = [member for member in group.members if member.leaving is None]
            enough = len(stay) + len(crew.arrived) >= crew.settings.min_workers
            if not enough and not (stay and any(self._must_go(member) for member in leavers)):
                leavers = []
            if not crew.arrived and not leavers:
                group.share_out()
                continue
            donor = (stay or group.members)[0]
            newcomers = self._let_in(crew)
            waits += self._hand_over(donor, newcomers, at[role])
            waits += group.form([member for member in crew.members if member not in leavers])
            for member in leavers:
                crew.members.remove(member)
                self._retire(crew, member, list(waits))
            if leavers:
                self._resized(crew, left=leavers)
        return waits

    def must_pause(self) -> bool:
        """Whether a trained role's last worker has to go and nobody is there to take over."""
        for role in TRAINERS:
            crew = self.cluster.crews[role]
            if not crew.staying and any(self._must_go(member) for member in crew.members):
                return True
        return False

    def _must_go(self, member: Member) -> bool:
        left = float("inf") if member.leaving is None else member.leaving - time.time()
        return left < PAUSE + 3 * self.iteration_seconds

    def let_scorers_in(self) -> None:
        """Let scorers that have arrived take part at once: they have no state."""
        if self.standing:
            self._let_in(self.cluster.crews["teacher"])

    def _let_in(self, crew: Crew) -> list[Member]:
        """Let those who have arrived be members."""
        newcomers = crew.enlist()
        if newcomers:
            if crew.role == "teacher":
                for member in newcomers:
                    self.cluster.scorers.add(member)
            if self.standing:
                self._resized(crew, joined=newcomers)
        return newcomers

    def _resized(self, crew: Crew, joined: list[Member] | None = None, left: list[Member] | None = None) -> None:
        facts = {"joined": [member.number for member in joined or []], "left": [member.number for member in left or []]}
        self.recorder.event("resized", role=crew.role, workers=len(crew.members), **facts, iteration=self.committed)

    def _retire(self, crew: Crew, member: Member, after: list[ObjectRef]) -> None:
        """End a worker once it has answered all its calls."""

        async def end() -> None:
            await asyncio.gather(*after, return_exceptions=True)
            try:
                if member.role == "teacher":
                    while self.cluster.scorers.holds(member):
                        await asyncio.sleep(0.05)
                else:
                    await member.actor.position.remote()
            except ray.exceptions.RayError:
                pass  # it is gone already
            crew.strike(member)

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
            self.owes_checkpoint = True
            self.recorder.say("the driver's own node goes away: a checkpoint is written, and the same command goes on")
            self.recorder.event("notice", role="driver", node=here, iteration=self.committed)
        for role, crew in self.cluster.crews.items():
            for member in [*crew.members, *crew.arrived]:
                end = draining.get(member.identity.node)
                if end is None or member.leaving is not None:
                    continue
                member.leaving = end
                seconds = None if end == float("inf") else round(end - time.time(), 3)
                self.recorder.event(
                    "notice", role=role, worker=member.number, node=member.identity.node, seconds_left=seconds,
                    iteration=self.committed,
                )  # fmt: skip
                if member in crew.arrived:
                    crew.strike(member)
                crew.fill()
            if role == "teacher":
                self._leave_pool(crew)

    def _leave_pool(self, crew: Crew) -> None:
        """Let scorers on leaving nodes go, but the last one only when another is there: it has nothing to lose."""
        leavers = [member for member in crew.members if member.leaving is not None]
        stay = len(crew.members) - len(leavers)
        for member in leavers:
            if stay:
                self.cluster.scorers.remove(member)
                crew.members.remove(member)
                self._retire(crew, member, [])
                self._resized(crew, left=[member])
