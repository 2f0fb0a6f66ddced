"""Who comes and who leaves: groups and the pool grow and shrink between their roles' min and max."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef

from raydmd.runtime.actors import TRAINERS, Cluster
from raydmd.runtime.membership.role_workers import Crew, Member
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.workers.base import Position

PAUSE = 5.0  # seconds before its node goes away at which a role's last worker stops at the latest


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        committed: iterations that are committed.
        scored: iterations that the teacher has scored.
        iteration_seconds: how long the last one took.
        standing: whether all workers were of one state once: the run has begun.
        owes_checkpoint: whether a manifest is due at the next edge.
    """

    committed: int = 0
    scored: int = 0
    iteration_seconds: float = 0.0
    standing: bool = False
    owes_checkpoint: bool = False


@dataclass
class Resizing:
    """Lets newcomers in and leavers out.

    Args:
        cluster: the actors.
        recorder: told what happens.
        progress: of the run.
    """

    cluster: Cluster
    recorder: Recorder
    progress: Progress
    _leaving: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

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
            if not enough and not (stay and any(self.must_go(member) for member in leavers)):
                leavers = []
            if not crew.arrived and not leavers:
                group.share_out()
                continue
            donor = (stay or group.members)[0]
            newcomers = crew.enlist()
            waits += hand_over(donor, newcomers, at[role])
            waits += group.form([member for member in crew.members if member not in leavers])
            for member in leavers:
                self._retire(crew, member, list(waits))
            self._task(self._tell(crew, newcomers, leavers, list(waits)))
        return waits

    def must_pause(self) -> bool:
        """Whether a trained role's last worker has to go and nobody is there to take over."""
        for role in TRAINERS:
            crew = self.cluster.crews[role]
            if not crew.staying and any(self.must_go(member) for member in crew.members):
                return True
        return False

    def must_go(self, member: Member) -> bool:
        """Whether the time of a worker's node is nearly over."""
        left = float("inf") if member.leaving is None else member.leaving - time.time()
        return left < PAUSE + 3 * self.progress.iteration_seconds

    def let_scorers_in(self) -> None:
        """Let scorers that have arrived take part at once: they have no state."""
        crew = self.cluster.crews["teacher"]
        if self.progress.standing and crew.arrived:
            self.resized(crew, joined=self.let_in(crew))

    def let_in(self, crew: Crew) -> list[Member]:
        """Let those who have arrived be members; return them."""
        newcomers = crew.enlist()
        if crew.role == "teacher":
            for member in newcomers:
                self.cluster.scorers.add(member)
        return newcomers

    async def _tell(self, crew: Crew, joined: list[Member], left: list[Member], after: list[ObjectRef]) -> None:
        """Write a change down once newcomers have their state."""
        try:
            await asyncio.gather(*after)
        except ray.exceptions.RayError:
            joined = [member for member in joined if member in crew.members]
        self.resized(crew, joined, left)

    def resized(self, crew: Crew, joined: list[Member] | None = None, left: list[Member] | None = None) -> None:
        """Write down that a role has other workers than before."""
        facts = {"joined": [member.number for member in joined or []], "left": [member.number for member in left or []]}
        self.recorder.event(
            "resized", role=crew.role, workers=len(crew.members), **facts, iteration=self.progress.committed
        )

    def _retire(self, crew: Crew, member: Member, after: list[ObjectRef]) -> None:
        """Let a worker go: it ends once it has answered all its calls and others stand where it does.

        Args:
            crew: its role's.
            member: the worker.
            after: calls by which the others come to stand there. If one fails, the worker's state may be the last of
                its kind: it stays among the leavers until the cluster is mended.
        """
        crew.let_go(member)

        async def end() -> None:
            try:
                await asyncio.gather(*after)
            except ray.exceptions.RayError:
                return
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
            self.progress.owes_checkpoint = True
            self.recorder.say("the driver's own node goes away: a checkpoint is written, and the same command goes on")
            self.recorder.event("notice", role="driver", node=here, iteration=self.progress.committed)
        for role, crew in self.cluster.crews.items():
            for member in [*crew.members, *crew.arrived]:
                end = draining.get(member.identity.node)
                if end is None or member.leaving is not None:
                    continue
                member.leaving = end
                seconds = None if end == float("inf") else round(end - time.time(), 3)
                self.recorder.event(
                    "notice", role=role, worker=member.number, node=member.identity.node, seconds_left=seconds,
                    iteration=self.progress.committed,
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
                self._retire(crew, member, [])
                self.resized(crew, left=[member])


def hand_over(donor: Member, to: list[Member], at: Position) -> list[ObjectRef]:
    """Have members stand where the donor does; in order with all its calls."""
    if not to:
        return []
    more = []
    if donor.role == "generator":
        experts = [donor.actor.expert.remote(index) for index in range(at.phase)]
        more = [donor.actor.pairs.remote(), *experts]
    state = donor.actor.state.remote(at.updates)
    return [member.actor.take_over.remote(at.phase, at.updates, state, *more) for member in to]
