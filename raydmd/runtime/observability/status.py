"""RUN/status.json, written once a second: what a run is doing, each worker's call, what is waited for."""

import os
import socket
import threading
import time
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from raydmd.atomic import write_text
from raydmd.errors import StorageError
from raydmd.runs.status import STATUS, RoleStatus, RunStatus, WorkerStatus
from raydmd.runtime.recovery.state import RunState, State

if TYPE_CHECKING:
    from raydmd.runtime.actors import RunActors
    from raydmd.runtime.controller import Controller
    from raydmd.runtime.membership.role_workers import RoleWorkers, WorkerHandle

EVERY_S = 1.0
LAST_S = 5.0  # for which an ending run waits for its last status to be written


class StatusWriter:
    """Writes the file from a thread of its own, so that it is written while the driver waits for anything else.

    It only reads what others hold. A disk that does not take the file, or hangs, costs the run nothing: then the file
    grows old, which `raydmd status` says.

    Used as a context, it ends the run's state as the block ends: FAILED by an error, STOPPED by an interruption.

    Args:
        folder: the run's folder.
        done: iterations that are committed already.
        ends: the iteration at which each phase ends.

    Attributes:
        state: the run's state.
        actors: the run's; None: there are none yet.
        controller: what trains; None: it has not begun.
    """

    def __init__(self, folder: Path, done: int, ends: list[int]) -> None:
        self.folder, self.done, self.ends = folder, done, ends
        self.state = RunState()
        self.actors: RunActors | None = None
        self.controller: Controller | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> "StatusWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.state.enter(State.STOPPED, "interrupted")
        elif error is not None:
            self.state.enter(State.FAILED, " ".join(str(error).split()) or type(error).__name__)
        self._ended.set()
        self._thread.join(LAST_S)

    def _run(self) -> None:
        while True:
            last = self._ended.is_set()
            with suppress(OSError, StorageError, RuntimeError):  # RuntimeError: what is read was changed meanwhile
                text = self.read().model_dump_json(indent=1) + "\n"
                if self.folder.is_dir():  # a run's folder that was removed is not made anew
                    write_text(self.folder / STATUS, text)
            if last:
                return
            self._ended.wait(EVERY_S)

    def read(self) -> RunStatus:
        """Return what the file says."""
        actors, controller = self.actors, self.controller
        recorder = controller.recorder if controller is not None else None
        done = max(self.done, controller.committed) if controller is not None else self.done
        phase = bisect_right(self.ends, done)
        roles = dict(actors.role_workers) if actors is not None else {}
        groups = actors.groups if actors is not None else {}
        return RunStatus(
            written=time.time(), host=socket.gethostname(), pid=os.getpid(), state=self.state.state,
            since=self.state.since, why=self.state.why,
            iteration=done, iterations=self.ends[-1], phase=min(phase, len(self.ends) - 1) + 1, phases=len(self.ends),
            last_commit=recorder.last_commit if recorder is not None else None,
            seconds_left=recorder.seconds_left(self.ends[-1] - done) if recorder is not None else None,
            pending_calls=controller.pending_calls if controller is not None else 0,
            waiting_for=[words for workers in roles.values() if (words := workers.words())],
            roles={
                role: _role(workers, groups[role].generation if role in groups else None)
                for role, workers in roles.items()
            },
        )  # fmt: skip


def _role(workers: "RoleWorkers", generation: int | None) -> RoleStatus:
    unplaced = len(workers.unplaced)
    return RoleStatus(
        active=len(workers.active), min=workers.settings.min_workers, max=workers.settings.max_workers,
        starting=len(workers.coming) - unplaced, unplaced=unplaced, generation=generation,
        workers=[_worker(worker) for worker in workers.everyone],
    )  # fmt: skip


def _worker(worker: "WorkerHandle") -> WorkerStatus:
    call, seconds, waits = None, None, False
    if worker.heartbeat is not None:
        heartbeat, heard = worker.heartbeat
        call, waits = heartbeat.method, heartbeat.waiting
        seconds = None if call is None else heartbeat.seconds + time.monotonic() - heard
    return WorkerStatus(
        number=worker.number, node=worker.identity.node, pid=worker.identity.pid, call=call, seconds=seconds,
        waiting_for_peers=waits, leaving=worker.leaving is not None,
    )  # fmt: skip
