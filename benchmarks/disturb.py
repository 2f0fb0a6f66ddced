"""What the benchmarks of losses share: Ray nodes on this machine that can vanish, and a run watched from outside.

Every worker has a node of its own, at its own address of loopback; the driver and the run's helpers are on the head.
The run is the ``raydmd distill`` command in a process of its own, so that it, too, can be killed.
"""

import raydmd.runtime  # noqa: F401  # has Ray keep to loopback, which it decides when it is imported

# isort: split
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from raydmd.jsonl import read_lines

ROLES = ("teacher", "fake", "generator")
HELPERS = ("PromptStream", "CheckpointWriter", "ControlCaller")
REPLICAS = 2
STORE = 150 * 2**20
HEALTH = {  # as the shipped cluster files have it: a node that is silent for about two seconds is dead
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
LOOK_EVERY = 0.002  # seconds between two looks at the run's files: what the figures can tell
PATIENCE = 300.0  # seconds after which something will not happen any more


def title(process: psutil.Process) -> str:
    """Return what a process calls itself; nothing if it is gone."""
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""


def layout(roles: Iterable[str]) -> list[str]:
    """Return the settings under which each role has two workers, each on a node of its own."""
    return [f"runtime.{role}={{max_workers: {REPLICAS}, resources: {{{role}: 1}}}}" for role in roles]


class Machines:
    """A Ray cluster of a head and two nodes for each role, each with a place for one worker."""

    def __init__(self, roles: Sequence[str] = ROLES) -> None:
        head = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": STORE})
        self._addresses = (f"127.0.{high}.{low}" for high in range(1, 250) for low in range(1, 250))
        self.nodes: dict[str, list[Any]] = {role: [] for role in roles}
        for _ in range(REPLICAS):
            for role in roles:
                self.add(role)

    def add(self, role: str) -> None:
        """Start a node with a place for one worker of a role."""
        node = self.cluster.add_node(
            num_cpus=1, resources={role: 1}, object_store_memory=STORE, node_ip_address=next(self._addresses)
        )
        self.nodes[role].append(node)

    def workers(self, role: str) -> list[psutil.Process]:
        """Return the processes of a role's workers."""
        return [worker for node in self.nodes[role] for worker in _below(node, f"{role.capitalize()}Worker")]

    def helpers(self, name: str) -> list[psutil.Process]:
        """Return the processes of a helper of the run."""
        return _below(self.cluster.head_node, name)

    def vanish(self, node: Any) -> float:
        """Kill a node's raylet and everything below it, as if its power had failed; return when."""
        raylet = _raylet(node)
        family = [raylet, *raylet.children(recursive=True)]
        when = time.time()
        for process in family:
            os.kill(process.pid, signal.SIGKILL)
        return when

    def replace(self, role: str, node: Any) -> None:
        """Put a new node into the place of one that vanished."""
        self.nodes[role].remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add(role)

    def close(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()


def _raylet(node: Any) -> psutil.Process:
    (started,) = node.all_processes["raylet"]
    return psutil.Process(started.process.pid)


def _below(node: Any, name: str) -> list[psutil.Process]:
    """Return a node's workers that hold an actor of some class."""
    return [process for process in _raylet(node).children(recursive=True) if title(process).startswith(f"ray::{name}")]


def kill(processes: list[psutil.Process]) -> float:
    """Send SIGKILL to processes, all at once; return when."""
    when = time.time()
    for process in processes:
        process.kill()
    return when


class Lines:
    """The records of a JSON-lines file that grows, and that may be replaced by one with some of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = self._offset = 0
        self._seen: set[bytes] = set()

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the records that were written since the last look."""
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            return
        if facts.st_ino != self._inode:
            self._inode, self._offset = facts.st_ino, 0
        if facts.st_size <= self._offset:
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            if line not in self._seen:
                self._seen.add(line)
                yield json.loads(line)


class Watched:
    """A distillation of digits in a process of its own, and what it has written so far.

    Attributes:
        lines: its metrics: when each was seen, and the record; those that a recovery took back stay.
        events: its events.
        at_work: how many workers each role has, by the run's own account.
    """

    def __init__(self, machines: Machines, folder: Path, settings: list[str], recipe: str = "digits") -> None:
        self.machines, self.folder, self.log = machines, folder, folder.with_suffix(".log")
        self.roles = list(machines.nodes)
        arguments = [word for setting in [*settings, *layout(self.roles)] for word in ("--set", setting)]
        program = "from raydmd.cli import main; main()"
        self.command = [sys.executable, "-c", program, "distill", recipe, *arguments, "--out", str(folder)]
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self.events: list[dict[str, Any]] = []
        self.at_work, self._since = dict.fromkeys(self.roles, 0), dict.fromkeys(self.roles, 0)
        self._metrics, self._told = Lines(folder / "metrics.jsonl"), Lines(folder / "events.jsonl")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        """Run the command."""
        environment = {**os.environ, "RAY_ADDRESS": self.machines.cluster.address, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def look(self) -> None:
        """Take in what it has written since the last look."""
        for event in self._told.new():  # first: a line of metrics is written before the event that tells of it
            self.events.append(event)
            self._count(event)
        self.lines += [(time.time(), line) for line in self._metrics.new()]

    def _count(self, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            self.at_work.update(event["workers"])
            self._since = dict.fromkeys(self.roles, len(self.lines))
        elif event["event"] == "resized":
            self.at_work[event["role"]] = event["workers"]
            self._since[event["role"]] = len(self.lines)
        elif event["event"] == "worker-lost":
            self.at_work[event["role"]] = event["left"]

    def whole(self, role: str | None = None) -> bool:
        """Whether a role, or every role, has all its workers, by its own account and by the processes there are.

        Who joins takes its state from another only then: the first step that is committed after may have been under
        way already, the second one had the newcomer in it.
        """
        roles = self.roles if role is None else [role]
        if any(self.at_work[name] < REPLICAS or len(self.lines) < self._since[name] + 2 for name in roles):
            return False
        return all(len(self.machines.workers(name)) == REPLICAS for name in roles)

    def of(self, kind: str, since: int = 0) -> list[dict[str, Any]]:
        """Return the events of a kind from the ``since``-th event on."""
        return [event for event in self.events[since:] if event["event"] == kind]

    def wait(self, what: str, condition: Callable[[], Any], every: float = LOOK_EVERY, ended: bool = False) -> None:
        """Look until something is so.

        Raises:
            RuntimeError: it was not within `PATIENCE` seconds, or the run ended first (unless ``ended`` allows it).
        """
        end = time.monotonic() + PATIENCE
        while True:
            over = self.process.poll() is not None
            self.look()
            if condition() or (over and ended):
                return
            if over or time.monotonic() > end:
                why = f"the run ended with {self.process.returncode}" if over else f"{PATIENCE:g} s have passed"
                tail = "\n".join(json.dumps(event) for event in self.events[-12:])
                raise RuntimeError(f"{why}, and not: {what}\n{self.log.read_text()[-3000:]}\n{tail}")
            time.sleep(every)

    def settle(self, iterations: int) -> None:
        """Wait until every role is whole and some iterations more were made."""
        self.wait("every role is whole", lambda: self.at_work and self.whole(), every=0.05)
        count = len(self.lines)
        self.wait(f"{iterations} iterations more", lambda: len(self.lines) >= count + iterations, every=0.01)

    def kill(self) -> float:
        """Kill the driver alone; return when."""
        when = time.time()
        self.process.kill()
        self.process.wait()
        self.look()
        return when

    def stop(self) -> None:
        """End the run as Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def seconds_of(folder: Path) -> float:
    """Return how long a run took that was not interrupted: from the start of its first iteration to its end."""
    events = {event["event"]: event["time"] for event in read_lines(folder / "events.jsonl")}
    return float(events["finished"] - events["started"])
