"""RUN/status.json: what a run is doing, as its driver writes it once a second and `raydmd status` shows it."""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel, ValidationError

from raydmd.errors import UserError

STATUS = "status.json"
STALE_S = 5.0  # it is written once a second
ENDED = ("finished", "stopped", "failed")


class WorkerStatus(BaseModel):
    """A worker that is up.

    Attributes:
        number: unique among all workers of its role in this run.
        node: Ray's id of its node.
        pid: its process.
        call: the call it is in; None: it is idle.
        seconds: for how long it has been in it.
        waiting_for_peers: whether it waits for the other replicas of its group.
        leaving: whether its node goes away.
    """

    number: int
    node: str
    pid: int
    call: str | None
    seconds: float | None
    waiting_for_peers: bool
    leaving: bool


class RoleStatus(BaseModel):
    """The workers of a role.

    Attributes:
        active: how many are at work.
        min, max: how many there may be.
        starting: how many are starting.
        unplaced: how many Ray has no room for.
        generation: of its process group; None: it has none.
        workers: those that are up.
    """

    active: int
    min: int
    max: int
    starting: int
    unplaced: int
    generation: int | None
    workers: list[WorkerStatus]


class RunStatus(BaseModel):
    """What a run is doing. Times are seconds since the epoch.

    Attributes:
        written: when this was written.
        host, pid: the driver's machine and process.
        state, since, why: the run's state (`runtime.recovery.state`), since when it is in it, and what made it.
        iteration, iterations: how many are committed, and how many there are in all.
        phase, phases: the one in training, from 1, and how many there are.
        last_commit: when the last iteration was committed; None: none was since this driver began.
        seconds_left: until the run's end, by the last iterations; None: none was committed yet.
        pending_calls: calls of workers that the driver waits for.
        waiting_for: workers that are on their way, in words.
        roles: the workers by role.
    """

    written: float
    host: str
    pid: int
    state: str
    since: float
    why: str
    iteration: int
    iterations: int
    phase: int
    phases: int
    last_commit: float | None
    seconds_left: float | None
    pending_calls: int
    waiting_for: list[str]
    roles: dict[str, RoleStatus]

    @property
    def has_ended(self) -> bool:
        """Whether the run is finished, was stopped or failed."""
        return self.state in ENDED

    def age(self) -> float:
        """Return seconds since it was written."""
        return max(0.0, time.time() - self.written)

    def is_stale(self) -> bool:
        """Whether its driver should have written a newer one; never of a run that has ended."""
        return self.age() > STALE_S and not self.has_ended


def read_status(run: Path) -> RunStatus:
    """Return what a run's status file says; the folder may be on storage that machines share.

    Raises:
        UserError: there is none, or it is broken.
    """
    path = run / STATUS
    try:
        return RunStatus.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        is_run = (run / "recipe.yaml").is_file()
        why = "the run has not begun, or a version that wrote none began it" if is_run else "is it a run's folder?"
        raise UserError(f"{run}: it has no {STATUS}; {why}") from None
    except ValidationError:
        raise UserError(f"{path}: broken; a run that is at work writes it anew each second") from None


def describe(run: Path, status: RunStatus) -> list[str]:
    """Return lines that tell a person what a run is doing.

    Args:
        run: the run's folder, as it was named.
        status: as `read_status` returned it.
    """
    then = status.written
    why = f" ({status.why})" if status.why else ""
    left = "" if status.seconds_left is None or status.has_ended else f", about {_duration(status.seconds_left)} left"
    if status.has_ended:
        when = f"{status.state} {_duration(max(0.0, time.time() - status.since))} ago"
    else:
        when = f"{status.state} for {_duration(then - status.since)}"
    lines = [
        f"{run}: {when}{why}",
        f"{status.iteration} of {status.iterations} iterations, phase {status.phase} of {status.phases}{left}",
    ]
    if status.is_stale():
        by = f"process {status.pid} on {status.host}"
        lines.insert(0, f"stale: {by} wrote this {_duration(status.age())} ago; {_driver(status)}")
    if status.has_ended:
        return lines
    if status.last_commit is not None:
        lines.append(f"last commit {_duration(then - status.last_commit)} ago, {status.pending_calls} calls pending")
    lines += [f"waiting: {words}" for words in status.waiting_for]
    for role, facts in status.roles.items():
        generation = "" if facts.generation is None else f", generation {facts.generation}"
        lines.append(f"{role}: {facts.active} of {facts.min} to {facts.max} workers at work{generation}")
        lines += [f"  {_worker(worker)}" for worker in facts.workers]
    return lines


def _worker(worker: WorkerStatus) -> str:
    doing = "idle" if worker.call is None else f"in {worker.call} for {worker.seconds or 0:.1f} s"
    doing += ", waits for its peers" if worker.waiting_for_peers else ""
    doing += ", its node goes away" if worker.leaving else ""
    return f"{worker.number}  node {worker.node[:8]}  pid {worker.pid}  {doing}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _driver(status: RunStatus) -> str:
    """Say what may have become of the driver, which can be looked for on its own machine only."""
    if status.host != socket.gethostname():
        return "it is gone, or its disk takes nothing"
    try:
        os.kill(status.pid, 0)
    except (ProcessLookupError, OverflowError):
        return "it is gone; the same command goes on"
    except PermissionError:
        pass
    return "it is there, and hangs or its disk takes nothing"
