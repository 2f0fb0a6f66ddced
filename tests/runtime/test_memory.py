"""Workers that Ray's memory monitor kills are lost like any that die; when that comes again it ends the run."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayTaskError
from rich.console import Console

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.jsonl import read_lines
from raydmd.methods.program import trace_method
from raydmd.runtime.actors import RunActors
from raydmd.runtime.membership.role_workers import RoleWorkers, WorkerHandle
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import is_gone, own_fault
from raydmd.runtime.recovery.manager import RecoveryManager
from raydmd.runtime.workers.base import Identity
from raydmd.runtime.workers.process_group import Rendezvous
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.trainer_group import TrainerGroup


def test_who_was_to_take_a_killed_ones_result_is_not_gone() -> None:
    killed = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory")
    through = RayTaskError("update", "", killed).as_instanceof_cause()
    assert is_gone(killed) and not is_gone(through)
    assert own_fault(killed) is own_fault(through) is killed


@pytest.fixture(scope="module")
def short_of_memory() -> Iterator[None]:
    """A Ray that thinks that a hundredth of the memory is all that may be used, and kills whatever is started."""
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        _system_config={"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def killed(short_of_memory: None) -> Callable[[str, int], WorkerHandle]:
    class Victim:  # in here, so that it travels by value: the workers do not have this file
        def progress(self) -> None:
            time.sleep(600)  # it is killed meanwhile

        def call(self, name: str, proposal: Any) -> None: ...

    def make(role: str, number: int) -> WorkerHandle:
        worker = WorkerHandle(role, number, ray.remote(Victim).options(num_cpus=0).remote(), Identity("a node", 1))
        with pytest.raises(OutOfMemoryError) as caught:
            ray.get(worker.actor.progress.remote())
        assert is_gone(caught.value) and own_fault(caught.value) is caught.value
        return worker

    return make


def test_a_trainer_that_was_killed_for_memory_is_taken_out(
    killed: Callable[[str, int], WorkerHandle], quick: Callable[..., Recipe], tmp_path: Path
) -> None:
    async def recover() -> None:
        recipe = quick("ring")
        trace = trace_method(recipe)
        role_workers = {role: RoleWorkers(role, recipe) for role in trace.method.roles}
        meeting = Rendezvous("127.0.0.1")
        groups = {role: TrainerGroup(role, [], meeting) for role in ("generator", "fake")}
        recorder = Recorder(tmp_path, recipe, 4, Console(quiet=True))
        recovery = RecoveryManager(
            recipe,
            trace,
            RunActors(role_workers, groups, {"teacher": ScorerPool(3)}, None, None, None),
            recorder,
            lambda: False,
        )
        role_workers["fake"].active.append(killed("fake", 0))
        role_workers["fake"].close()
        assert await recovery._ask_progress() == {}
        assert role_workers["fake"].active == []
        recorder.close()

    asyncio.run(recover())
    (lost,) = read_lines(tmp_path / "events.jsonl")
    assert lost["event"] == "worker-lost" and "low on memory" in lost["why"]


def test_scorers_that_are_killed_for_memory_are_taken_out_and_end_the_batch_that_they_die_of(
    killed: Callable[[str, int], WorkerHandle],
) -> None:
    async def score() -> None:
        losses: list[WorkerHandle] = []
        pool = ScorerPool(2, lambda worker, error: losses.append(worker))
        workers = [killed("teacher", number) for number in range(2)]
        for worker in workers:
            pool.add(worker)
        with pytest.raises(OutOfMemoryError):
            await pool.map("score", [(0,)])
        assert losses == workers and pool.workers == []

    asyncio.run(score())


def test_workers_that_are_killed_for_memory_as_they_start_are_asked_for_again_but_not_for_ever(
    short_of_memory: None, quick: Callable[..., Recipe]
) -> None:
    def wait(recipe: Recipe, device: str) -> Any:
        time.sleep(600)  # it is killed meanwhile

    async def start() -> None:
        changed = asyncio.Event()
        workers = RoleWorkers("teacher", quick("ring", "runtime.max_failures=2"), wait, changed.set)
        workers.fill()
        await asyncio.wait_for(changed.wait(), 300)
        assert isinstance(workers.failure, OutOfMemoryError) and workers.coming == []
        workers.close()

    asyncio.run(start())
