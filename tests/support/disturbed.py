"""A distillation that things happen to: a thread tells the story while the run goes on, and the bits are compared."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from rich.console import Console
from worker_forks import descendants

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.jsonl import read_lines
from raydmd.methods.local import train
from raydmd.methods.registry import build_method
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.launch import distill

STORE = 80 * 2**20
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
STOPS_S = 120.0  # within which a run that is told to stop has stopped
AFTER_S = 15.0  # for which a plot may wait for something when its run has ended
CLASSES = {"teacher": "TeacherWorker", "fake": "FakeWorker", "generator": "GeneratorWorker"}

_plot = threading.local()  # in a plot's thread: its story


@contextmanager
def head_alone(num_cpus: int, **system_config: Any) -> Iterator[Cluster]:
    """Start a Ray of one node on loopback and join it, without those of Ray's processes that no run uses.

    Those are the autoscaler's and the one that reads logs for drivers: what is started by `ray.init` has them.
    """
    cluster = Cluster(
        initialize_head=True,
        shutdown_at_exit=False,  # its hooks can be set in the main thread only, and nodes are added in others
        head_node_args={
            "num_cpus": num_cpus, "object_store_memory": STORE, "include_dashboard": False,
            "no_monitor": True, "include_log_monitor": False, "_system_config": system_config,
        },
    )  # fmt: skip
    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def several_nodes(*nodes: dict[str, float]) -> Iterator[Cluster]:
    """Start a head and a node for each set of resources, all on loopback, and join them."""
    with head_alone(2, **QUICK_HEALTH_CHECKS) as cluster:
        for resources in nodes:
            add_node(cluster, resources)
        yield cluster


def add_node(cluster: Cluster, resources: dict[str, float]) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE, resources=resources)


def kill_node(node: Any) -> None:
    """Have a node vanish: its raylet and all below it at once."""
    _signal_node(node, signal.SIGKILL)


def freeze_node(node: Any) -> None:
    """Have a node fall silent, as one that lost its power does: no connection to it closes."""
    _signal_node(node, signal.SIGSTOP)


def _signal_node(node: Any, number: signal.Signals) -> None:
    (raylet,) = [info.process for info in node.all_processes["raylet"]]
    family = psutil.Process(raylet.pid)
    for process in [family, *descendants(family)]:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def drain(cluster: Cluster, node: Any, seconds: int) -> None:
    """Tell Ray that a node will go away, as `ray drain-node` does."""
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node.node_id, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot",
        int((time.time() + seconds) * 1000),
    )  # fmt: skip
    assert accepted, why


def on_node(node: Any) -> list[str]:
    """The run's workers on a node that are there or on their way."""
    actors = ray._private.state.actors().values()
    there = [a["ActorClassName"] for a in actors if a["Address"]["NodeID"] == node.node_id and a["State"] != "DEAD"]
    return [name for name in there if name in CLASSES.values()]


def wait_until(condition: Callable[[], Any], seconds: float = 240.0, pause: float = 0.01) -> Any:
    """Wait until something comes true; in a plot, not for long after the run's end, nor past the story's limit."""
    story: Story | None = getattr(_plot, "story", None)
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "never came true"
        assert story is None or time.monotonic() < story.ends, "never came true while the run went on"
        time.sleep(pause)
    return found


class Story:
    """What happens to a run: ``plot(story)`` is told in a thread, then the run is stopped as by Ctrl-C.

    A run that ends by itself ends its plot, and one that does not stop is interrupted: neither outlives its test.

    Args:
        recipe: the run's recipe, with more iterations than the plot can take.
        folder: the run's folder.
        plot: does things to the run; an assertion that fails in it fails the test.
        limit_s: seconds after which the plot waits for nothing more; default: each wait has its own limit only.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, plot: Callable[["Story"], None], limit_s: float = float("inf"), **more: Any
    ) -> None:
        self.recipe, self.folder, self.plot, self.more = recipe, folder, plot, more
        self.error: BaseException | None = None
        self.finished: bool | None = None
        self._over, self._limit_s, self.ends = threading.Event(), limit_s, float("inf")

    def run(self) -> "Story":
        """Run it to the plot's end; raise what the run or the plot raised."""
        self.ends = time.monotonic() + self._limit_s
        thread = threading.Thread(target=self._tell, daemon=True)
        thread.start()
        try:
            self.finished = distill(self.recipe, self.folder, console=Console(quiet=True), **self.more)
        except KeyboardInterrupt:
            if self.error is None:
                raise
        finally:
            self._over.set()
            self.ends = min(self.ends, time.monotonic() + AFTER_S)
            if self.finished is not None:
                thread.join(180)
            if self.error is not None:
                raise self.error
        return self

    def _tell(self) -> None:
        _plot.story = self
        try:
            wait_until(lambda: self.events("started"))
            self.plot(self)
        except BaseException as error:
            self.error = error
        for _ in range(2):  # the second is a KeyboardInterrupt
            if self._over.is_set():
                return
            os.kill(os.getpid(), signal.SIGINT)
            if self._over.wait(STOPS_S):
                return
            faulthandler.dump_traceback(sys.__stderr__)
            self.error = self.error or AssertionError(f"the run did not stop within {STOPS_S:g} s")

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    def events(self, kind: str | None = None, **facts: Any) -> list[dict[str, Any]]:
        found = read_lines(self.folder / "events.jsonl")
        return [e for e in found if kind in (None, e["event"]) and facts.items() <= e.items()]

    def until(self, condition: Callable[[], Any]) -> Any:
        return wait_until(condition)

    def go_on(self, iterations: int) -> None:
        """Wait until so many more iterations are committed."""
        at = self.lines()[-1]["iteration"] if self.lines() else -1
        wait_until(lambda: self.lines() and self.lines()[-1]["iteration"] >= at + iterations)

    def complete(self) -> None:
        """Wait until every role has all its workers at work again, and three iterations more."""
        roles = ("teacher", "fake", "generator")
        most = {role: getattr(self.recipe.runtime, role).max_workers for role in roles}

        def is_complete() -> bool:
            lines = self.lines()
            return bool(lines) and all(lines[-1]["roles"][role]["workers"] == most[role] for role in roles)

        wait_until(is_complete)
        self.go_on(3)

    def processes(self, actor_class: str) -> list[psutil.Process]:
        """The processes of an actor class that are up, oldest first."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                title = (process.cmdline() or [""])[0]
                if title.startswith(f"ray::{actor_class}") and "__init__" not in title:
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def pids(self, role: str) -> list[int]:
        """The processes of a role's workers that are up, oldest first."""
        return [process.pid for process in self.processes(CLASSES[role])]

    def kill(self, role: str, *which: int) -> None:
        """SIGKILL workers of a role, by age (0 the oldest)."""
        pids = self.pids(role)
        for index in which or (0,):
            os.kill(pids[index], signal.SIGKILL)

    def lost_and_recovered(self, count: int, **facts: Any) -> list[dict[str, Any]]:
        """Wait until ``count`` losses are told, and a recovery after the last; return the recoveries."""
        wait_until(lambda: len(self.events("worker-lost")) >= count)
        wait_until(lambda: sum(len(e["workers"]) for e in self.events("recovered")) >= count)
        return self.events("recovered", **facts)


def assert_bits_of_the_reference(story: Story, prompts: Any) -> None:
    """Hold every trained role's state in the last manifest against the sequential reference's at that iteration."""
    found = Archive(str(story.folder / "checkpoints")).newest()
    manifest = found.manifest
    assert manifest is not None and found.skipped == []
    recipe, family = story.recipe, recipe_family(story.recipe)
    expected = train(
        recipe, family, family.load_teacher(), prompts(recipe.teacher.family), iterations=manifest.iteration
    )
    for role in build_method(recipe).trained():
        state = expected.parts[role].flat.state()
        assert set(found.shards[role]) == set(state)
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(found.shards[role][name]), value), (role, name)
    lines = story.lines()
    assert [line["iteration"] for line in lines] == list(range(manifest.iteration))
    assert json.loads((story.folder / "metrics.jsonl").read_text().splitlines()[-1]) == lines[-1]
