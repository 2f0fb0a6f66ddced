"""What goes on beside the loop: workers' pulses, nodes that are to go away, arrivals in the pool, who is awaited."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import ActorUnavailableError

from raydmd.errors import RunError
from raydmd.runtime.crew import Crew, Member
from raydmd.runtime.elastic import Elastic, Stopped
from raydmd.runtime.faults import in_words, is_gone
from raydmd.runtime.workers import Pulse

EVERY = 1.0
SAY_AFTER = 15.0


@dataclass
class Watch:
    """Looks after a run's workers once a second."""

    elastic: Elastic
    _heard: dict[Member, float] = field(default_factory=dict)
    _said: dict[str, int] = field(default_factory=dict)
    _without: float = field(default_factory=time.monotonic)

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
                tasks.create_task(self._feel_pulses())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            for crew in self.elastic.cluster.crews.values():
                if crew.failure is not None:
                    raise crew.failure
                self._say_who_waits(crew)
                self._say_who_fails(crew)
            self.elastic.resizing.leave_nodes(await asyncio.to_thread(draining_nodes))
            self.elastic.resizing.let_scorers_in()
            self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        """End a run that has waited for a scorer for too long, or is to stop meanwhile."""
        teachers, runtime = self.elastic.cluster.crews["teacher"], self.elastic.recipe.runtime
        if teachers.members or not self.elastic.progress.standing:
            self._without = time.monotonic()
        elif self.elastic.stopping():
            raise Stopped
        elif time.monotonic() - self._without > runtime.placement_timeout:
            raise RunError(f"no teacher came within {runtime.placement_timeout:g} s: it waits for {teachers.asks}")

    async def _feel_pulses(self) -> None:
        """Treat as dead who has not answered, or been in one call, for too long."""
        limit = self.elastic.recipe.runtime.dead_after
        while True:
            await asyncio.sleep(EVERY)
            crews = self.elastic.cluster.crews.values()
            members = [member for crew in crews for member in crew.everyone]
            actors = [member.actor for member in members]
            try:
                pulses = await self.elastic.cluster.warden.ask.remote(actors, "pulse", (), EVERY)
            except ray.exceptions.RayError:
                continue  # the warden itself was lost, and comes back
            for member, pulse in zip(members, pulses, strict=True):
                self._judge(member, pulse, limit)
            self._heard = {member: when for member, when in self._heard.items() if member in members}

    def _judge(self, member: Member, pulse: Any, limit: float) -> None:
        now = time.monotonic()
        if isinstance(pulse, Pulse):
            self._heard[member] = now
            if pulse.seconds > limit and not pulse.waiting:
                self.elastic.lost(member, f"in one call ({pulse.method}) for over {limit:g} s")
        elif is_gone(pulse) and not isinstance(pulse, ActorUnavailableError):
            self.elastic.lost(member, pulse)
        elif now - self._heard.setdefault(member, now) > limit:
            self.elastic.lost(member, f"did not answer for over {limit:g} s")

    def _say_who_waits(self, crew: Crew) -> None:
        """Tell which role waits for what, once for each number of workers."""
        since, count = crew.waiting_since(), len(crew.coming)
        self.elastic.recorder.exported.waiting(crew.role, count)
        if since is None or time.monotonic() - since < SAY_AFTER or not crew.members:
            self._said.pop(crew.role, None) if since is None else None
            return
        if self._said.get(crew.role) != count:
            self._said[crew.role] = count
            recorder = self.elastic.recorder
            recorder.say(f"going on without: {count} {crew.role} worker(s) wait for {crew.asks} each")
            recorder.event("waiting", role=crew.role, workers=count, asks=crew.asks)

    def _say_who_fails(self, crew: Crew) -> None:
        """Tell of workers that a role can do without and that fail whenever they are started."""
        error, crew.trouble = crew.trouble, None
        if error is not None:
            why, recorder = in_words(error), self.elastic.recorder
            recorder.say(f"going on without: a {crew.role} worker does not start: {why}")
            recorder.event("start-failed", role=crew.role, why=why)


def draining_nodes() -> dict[str, float]:
    """Return the nodes that Ray is told will go away, with the time.time() of their end (infinity: no date)."""
    return {node: at / 1000 if at else float("inf") for node, at in state.get_draining_nodes().items()}
