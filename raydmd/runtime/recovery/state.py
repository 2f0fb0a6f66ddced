"""The one state of a run, and which changes of it there are."""

import logging
import time
from enum import StrEnum

log = logging.getLogger("raydmd.runtime.state")


class State(StrEnum):
    """What a run is doing.

    Attributes:
        STARTING: its workers are placed and started, and take their first state.
        RUNNING: it trains.
        RESIZING: it trains, and newcomers take over the state or workers leave.
        RECOVERING: workers were lost; those that are left agree from where to go on.
        REWINDING: all take the state of the last manifest.
        STOPPING: it was told to stop, and finishes what is under way.
        FINISHED, STOPPED, FAILED: it has ended.
    """

    STARTING = "starting"
    RUNNING = "running"
    RESIZING = "resizing"
    RECOVERING = "recovering"
    REWINDING = "rewinding"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


ENDS = frozenset({State.FINISHED, State.STOPPED, State.FAILED})
_WORK = frozenset({State.RUNNING, State.RESIZING, State.RECOVERING, State.REWINDING})
_NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.RUNNING, State.STOPPING}) | ENDS,
    State.RUNNING: frozenset({State.RESIZING, State.RECOVERING, State.STOPPING}) | ENDS,
    State.RESIZING: frozenset({State.RUNNING, State.RECOVERING, State.STOPPING}) | ENDS,
    State.RECOVERING: frozenset({State.RUNNING, State.REWINDING, State.STOPPING}) | ENDS,
    State.REWINDING: frozenset({State.RUNNING, State.RECOVERING, State.STOPPING}) | ENDS,
    State.STOPPING: ENDS,
} | dict.fromkeys(ENDS, frozenset())


class RunState:
    """A run's state. Every change goes through `enter`, which logs it.

    Attributes:
        state: the one it is in.
        since: time.time() when it came into it.
        why: what made it.
    """

    def __init__(self) -> None:
        self.state, self.since, self.why = State.STARTING, time.time(), ""

    def enter(self, state: State, why: str = "") -> None:
        """Change the state, and log it.

        A run that is to stop stays STOPPING whatever happens to its workers meanwhile. A change that the table above
        does not have is made, too, and logged as an error: what is shown of a run never ends it.

        Args:
            state: the new one; the old one again changes nothing.
            why: a few words for the log and for `raydmd status`.
        """
        if state == self.state or (self.state == State.STOPPING and state in _WORK):
            return
        known = state in _NEXT[self.state]
        log.log(
            logging.INFO if known else logging.ERROR, "%s -> %s%s%s", self.state, state, f": {why}" if why else "",
            "" if known else " (there is no such change)",
        )  # fmt: skip
        self.state, self.since, self.why = state, time.time(), why
