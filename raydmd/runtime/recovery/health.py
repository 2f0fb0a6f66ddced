"""What goes on beside the loop: workers' pulses, nodes that are to go away, arrivals in the pool, who is awaited."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import ActorUnavailableError

from raydmd.errors import RunError
from raydmd.runtime.checkpoint.queue import STOP_PATIENCE_S
from raydmd.runtime.membership.role_workers import Crew, Member
from raydmd.runtime.membership.unplaced import find_unplaced
from raydmd.runtime.recovery.faults import Stopped, in_words, is_gone
from raydmd.runtime.recovery.helper_health import CALLER, PROMPTS, WRITER
from raydmd.runtime.recovery.manager import Elastic
from raydmd.runtime.workers.base import Pulse

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
            crews = list(self.elastic.cluster.crews.values())
            unplaced = await asyncio.to_thread(find_unplaced, crews) if any(crew.coming for crew in crews) else {}
            for crew in crews:
                crew.see_placed(unplaced.get(crew.role, set()))
                if crew.failure is not None:
                    raise crew.failure
                self._say_who_waits(crew)
                self._say_who_fails(crew)
            self.elastic.resizing.leave_nodes(await asyncio.to_thread(draining_nodes))
            self.elastic.resizing.let_scorers_in()
            self._give_up_waiting()
            self._leave_silent_helpers()

    def _leave_silent_helpers(self) -> None:
        """Stop a run that is to stop without the helper that its iteration would wait for."""
        silent = max(self.elastic.monitor.silent_s(name) for name in (PROMPTS, CALLER))
        if self.elastic.stopping() and silent > STOP_PATIENCE_S:
            raise Stopped

    def _give_up_waiting(self) -> None:
        """End a run that has waited for a scorer for too long, or is to stop meanwhile."""
        teachers, runtime = self.elastic.cluster.crews["teacher"], self.elastic.recipe.runtime
        if teachers.members or not self.elastic.progress.standing:
            self._without = time.monotonic()
        elif self.elastic.stopping():
            raise Stopped
        elif time.monotonic() - self._without > runtime.placement_timeout:
            raise RunError(f"no teacher came within {runtime.placement_timeout:g} s: {teachers.words()}")

    async def _feel_pulses(self) -> None:
        """Treat as dead who has not answered, or been in one call, for too long."""
        limit = self.elastic.recipe.runtime.dead_after
        while True:
            crews = self.elastic.cluster.crews.values()
            members = [member for crew in crews for member in crew.everyone]
            if (pulses := await self._ask([member.actor for member in members])) is None:
                self._heard.clear()  # nobody was asked
            else:
                for member, pulse in zip(members, pulses, strict=True):
                    self._judge(member, pulse, limit)
                self._heard = {member: when for member, when in self._heard.items() if member in members}
            await asyncio.sleep(EVERY)

    async def _ask(self, actors: list[Any]) -> list[Any] | None:
        """Return workers' pulses, and take note of helpers' heartbeats; None: the control caller was lost.

        It asks for both, for a call of the driver's own to a helper waits behind those whose arguments are to come.
        """
        cluster, monitor = self.elastic.cluster, self.elastic.monitor
        helpers = {WRITER: cluster.archivist, PROMPTS: cluster.prompts}
        answers = asyncio.gather(
            cluster.warden.heartbeat.remote(),
            cluster.warden.ask.remote(list(helpers.values()), "heartbeat", (), EVERY),
            cluster.warden.ask.remote(actors, "pulse", (), EVERY),
        )
        answers.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to look
        while not (await asyncio.wait((answers,), timeout=2 * EVERY))[0]:
            monitor.heard(CALLER, TimeoutError())
        try:
            own, beats, pulses = answers.result()
        except ray.exceptions.RayError as error:
            monitor.heard(CALLER, error)
            return None
        was_lost = monitor.is_lost(CALLER)
        monitor.heard(CALLER, own)
        if was_lost:  # its answers are of long ago, or nobody had the time to give one
            return None
        for name, beat in zip(helpers, beats, strict=True):
            monitor.heard(name, beat)
        return list(pulses)

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
        since, count = crew.waiting_since(), len(crew.unplaced)
        self.elastic.recorder.exported.waiting(crew.role, count)
        if since is None or not count or time.monotonic() - since < SAY_AFTER or not crew.members:
            self._said.pop(crew.role, None) if since is None else None
            return
        if self._said.get(crew.role) != count:
            self._said[crew.role] = count
            recorder = self.elastic.recorder
            recorder.say(f"going on without: {crew.words()}")
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
