"""The checkpoint writer: an actor that may be killed at any moment, and leaves nothing undone."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from mortal import expert, is_of, manifest, same, shards
from safetensors import safe_open
from safetensors.numpy import load_file

from raydmd.runs.folders import expert_file
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.checkpoint.shards import LabelledTensors
from raydmd.runtime.checkpoint.writer import NICE, CheckpointWriter
from raydmd.runtime.workers.helpers import HelperHeartbeat, start_helper


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


def process(checkpoint_writer: Any) -> tuple[int, int]:
    """Return an actor's process and its niceness."""
    return ray.get(checkpoint_writer.__ray_call__.remote(lambda _: (os.getpid(), os.getpriority(os.PRIO_PROCESS, 0))))


@pytest.fixture
def make() -> Iterator[Any]:
    """A maker of actors as a run has them: ``make(folder, uri, keep)``."""
    actors = []

    def start(folder: Path, uri: str | None = None, keep: int = 2) -> Any:
        actors.append(start_helper(CheckpointWriter, str(folder), uri or f"{folder}/checkpoints", keep))
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


def save(checkpoint_writer: Any, iteration: int, **changes: Any) -> Any:
    states = [ray.put(state) for state in shards(iteration).values()]
    return checkpoint_writer.save.remote(manifest(iteration, **changes), list(shards(iteration)), *states)


def test_what_is_saved_is_restored_by_another(make: Any, tmp_path: Path) -> None:
    first = make(tmp_path, f"file://{tmp_path}/elsewhere")
    assert ray.get(first.ready.remote()) == f"{tmp_path}/elsewhere"
    assert ray.get(first.restore.remote()) == (None, [], {})
    ray.get(first.save_expert.remote(0, expert(7)))
    written, seconds = ray.get(save(first, 3, experts=1))
    assert written.files.keys() == {"generator", "fake", "expert-0"} and seconds > 0
    assert is_of(Archive(str(tmp_path / "elsewhere")).newest(), 3, (7,))
    assert same(load_file(expert_file(tmp_path, 0)), expert(7))
    ray.get(save(first, 5, experts=1))
    (tmp_path / "elsewhere/step-000005.json").write_text("{")
    other = tmp_path / "other"  # a machine without the run's folder
    found, skipped, references = ray.get(make(other, str(tmp_path / "elsewhere")).restore.remote())
    assert found == written and len(skipped) == 1
    restored = {name: ray.get(reference) for name, reference in references.items()}
    assert restored.keys() == written.files.keys() and same(restored["expert-0"], expert(7))
    assert all(same(restored[name], state) for name, state in shards(3).items())
    assert same(load_file(expert_file(other, 0)), expert(7))


def test_a_run_folders_expert_that_differs_is_replaced_and_one_that_does_not_is_left(make: Any, tmp_path: Path) -> None:
    checkpoint_writer, path = make(tmp_path), expert_file(tmp_path, 0)
    ray.get([checkpoint_writer.save_expert.remote(0, expert(7)), save(checkpoint_writer, 3, experts=1)])
    before = path.stat().st_mtime_ns
    ray.get(checkpoint_writer.restore.remote())
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-1])
    ray.get(checkpoint_writer.restore.remote())
    assert same(load_file(path), expert(7))


def test_its_heartbeat_says_what_it_is_at_and_that_it_gets_on(make: Any, tmp_path: Path) -> None:
    checkpoint_writer = make(tmp_path)
    pid, _ = process(checkpoint_writer)
    assert ray.get(checkpoint_writer.heartbeat.remote()) == HelperHeartbeat(pid, None, 0)
    saved = checkpoint_writer.save.remote(
        manifest(3), ["generator"], ray.put({"w": np.arange(2**26, dtype=np.float32)})
    )
    seen: set[int] = set()
    while not ray.wait([saved], timeout=0)[0]:
        beat = ray.get(checkpoint_writer.heartbeat.remote())  # while it is at work
        seen |= {beat.progress} if beat.call == "save" else set()
    assert len(seen) > 2 and ray.get(checkpoint_writer.heartbeat.remote()).call is None


def test_trainers_come_first(make: Any, tmp_path: Path) -> None:
    pid, nice = process(make(tmp_path))
    others = ray.get(ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote())  # Ray's own choice
    assert nice == min(others + NICE, 19) > others and pid != os.getpid()


def test_a_kill_in_the_middle_of_a_save_is_made_good_by_the_actors_restart(make: Any, tmp_path: Path) -> None:
    checkpoint_writer = make(tmp_path)
    ray.get([checkpoint_writer.save_expert.remote(0, expert(7)), save(checkpoint_writer, 3, experts=1)])
    big = {"w": np.arange(2**26, dtype=np.float32)}  # 256 MB
    for iteration, role in ((4, "generator"), (4, "fake")):
        pid, _ = process(checkpoint_writer)
        saved = checkpoint_writer.save.remote(manifest(iteration, experts=1), [role], ray.put(big))
        part = tmp_path / f"checkpoints/step-{iteration:06d}"
        end = time.monotonic() + 60
        while not (part.is_dir() and any(path.name.endswith(".part") for path in part.iterdir())):
            assert time.monotonic() < end
        os.kill(pid, signal.SIGKILL)
        written, _ = ray.get(saved, timeout=300)
        assert written.files.keys() == {role, "expert-0"} and not psutil.pid_exists(pid)
        found = Archive(f"{tmp_path}/checkpoints").newest()
        assert found.manifest == written and not found.skipped and same(found.shards[role], big)
        assert process(checkpoint_writer)[0] != pid


def test_metadata_comes_through_the_object_store(make: Any, tmp_path: Path) -> None:
    checkpoint_writer = make(tmp_path)
    weights = ray.put(LabelledTensors(expert(7), {"format": "pt", "alpha": "8"}))
    ray.get([checkpoint_writer.save_expert.remote(0, weights), save(checkpoint_writer, 3, experts=1)])
    written = expert_file(tmp_path, 0).read_bytes()
    with safe_open(expert_file(tmp_path, 0), "np") as opened:
        assert opened.metadata() == {"format": "pt", "alpha": "8"}
    expert_file(tmp_path, 0).unlink()
    ray.get(checkpoint_writer.restore.remote())
    assert expert_file(tmp_path, 0).read_bytes() == written
