"""Whether the run's helpers answer and get on; those that do not for too long are killed, and Ray starts them again."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.ray_compat import actor_record
from raydmd.runtime.workers.helpers import HelperHeartbeat

WRITER, PROMPTS, CALLER = "checkpoint writer", "prompt stream", "control caller"
START_S = 60.0  # seconds that a helper has to start in, at least


@dataclass
class _Health:
    """What is known of one helper; times are time.monotonic()."""

    heard: float
    advanced: float
    last: HelperHeartbeat | None = None
    starting: float | None = None  # since when it is being started again
    lost: float | None = None  # since when it was seen to be lost; None: it answers


@dataclass
class HelperMonitor:
    """Follows the helpers' heartbeats.

    Args:
        helpers: the actors by name; all of them are up.
        recorder: told of losses and recoveries.
        dead_after_s: seconds without an answer, or within one call without getting on, after which one is replaced.
    """

    helpers: Mapping[str, Any]
    recorder: Recorder
    dead_after_s: float
    _health: dict[str, _Health] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = time.monotonic()
        self._health = {name: _Health(now, now) for name in self.helpers}

    def is_lost(self, name: str) -> bool:
        """Whether a helper was replaced, or seen to be gone, and has not answered since."""
        return self._health[name].lost is not None

    def silent_s(self, name: str) -> float:
        """Return for how many seconds a helper has not answered."""
        return time.monotonic() - self._health[name].heard

    def still_s(self, name: str) -> float:
        """Return for how many seconds a helper has not got on, whether it has anything to do or not."""
        return time.monotonic() - self._health[name].advanced

    def heard(self, name: str, answer: Any) -> None:
        """Take note of an answer, or of the error in its place; replace the helper when it is due."""
        health, now = self._health[name], time.monotonic()
        if isinstance(answer, HelperHeartbeat):
            if health.lost is not None and health.last is not None and health.last.pid == answer.pid:
                return  # it was killed, and has not noticed yet
            self._answered(name, health, answer, now)
            if answer.call is not None and now - health.advanced > self.dead_after_s:
                self.replace(name, f"in one call ({answer.call}) without getting on for over {self.dead_after_s:g} s")
            return
        since, limit = health.heard, self.dead_after_s
        if health.starting is None and now - since > limit and not _is_up(self.helpers[name]):
            health.starting = now  # Ray knows that it is gone, and starts it again
        if health.starting is not None:
            since, limit = health.starting, max(limit, START_S)
        if now - since > limit:
            self.replace(name, f"did not answer for over {limit:g} s")

    def replace(self, name: str, why: str) -> None:
        """Kill a helper, so that Ray starts it again and makes its unfinished calls anew."""
        health = self._health[name]
        if health.lost is None:
            health.lost = health.heard
        if health.last is None:  # so that an answer of the process that is killed now is known as such
            health.last = HelperHeartbeat(int(actor_record(self.helpers[name]).get("Pid") or 0), None, 0)
        health.starting = time.monotonic()
        self._tell(name, why)
        ray.kill(self.helpers[name], no_restart=False)

    def _answered(self, name: str, health: _Health, answer: HelperHeartbeat, now: float) -> None:
        last, health.last = health.last, answer
        if last is None or last.pid != answer.pid:
            if last is not None and health.lost is None:
                health.lost = health.heard
                self._tell(name, "its process was killed or crashed")
            if health.lost is not None:
                seconds, health.lost = round(now - health.lost, 3), None
                self.recorder.event("helper-recovered", helper=name, seconds=seconds)
                self.recorder.say(f"the {name} is there again after {seconds:.2f} s")
            moved = answer.progress > 0
        else:
            moved = answer.progress != last.progress
        if moved:
            health.advanced = now
        health.heard, health.starting = now, None

    def _tell(self, name: str, why: str) -> None:
        self.recorder.say(f"lost the {name}: {why}; it is started again")
        self.recorder.event("helper-lost", helper=name, why=why)


def _is_up(actor: Any) -> bool:
    """Whether Ray takes an actor's process to be there and past its start."""
    return actor_record(actor).get("State") == "ALIVE"
