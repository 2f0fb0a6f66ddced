"""Workers that are stuck in their start hold nobody; those that start are told from those that have no room."""

import io
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from disturbed import Story, head_alone, wait_until
from rich.console import Console

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.errors import RunError, UserError
from raydmd.runtime.launch import distill
from raydmd.runtime.membership import placement, start_patience
from raydmd.runtime.workers.base import make_part
from raydmd.training.fake_score import Fake


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this file
    with head_alone(4):
        yield


def stuck_if_told(folder: str, recipe: Any, device: str) -> Any:
    """Build a fake score's part; whoever finds the file stuck takes it away, and never comes to an end."""
    part = make_part(Fake, recipe, device)
    try:
        (Path(folder) / "first").touch(exist_ok=False)  # by one of those that start at once
        return part
    except FileExistsError:
        pass
    try:
        (Path(folder) / "stuck").unlink()
    except FileNotFoundError:
        return part
    (Path(folder) / "taken").touch()
    while True:
        time.sleep(0.1)


def test_a_worker_that_is_stuck_in_its_start_holds_nobody(
    here: None, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two is stuck at launch, and the one that comes for a lost one is stuck later."""
    monkeypatch.setattr(placement, "START_PATIENCE_S", 1.0)
    monkeypatch.setattr(start_patience, "LEAST_START_S", 600.0)  # nobody is taken for stuck before the run has begun
    monkeypatch.setattr(start_patience, "SLOWER", 1.5)
    (tmp_path / "stuck").touch()

    def plot(story: Story) -> None:
        assert (tmp_path / "taken").exists()
        assert story.events("started")[0]["workers"]["fake"] == 1
        story.go_on(3)
        monkeypatch.setattr(start_patience, "LEAST_START_S", 5.0)
        story.until(lambda: story.events("start-failed", role="fake"))
        assert "it was starting for over" in story.events("start-failed")[0]["why"]
        story.complete()
        failed = len(story.events("start-failed")) + 1  # a machine that is busy by then may have had more than one
        (tmp_path / "taken").unlink()
        (tmp_path / "stuck").touch()
        story.kill("fake")
        story.lost_and_recovered(1)
        story.until(lambda: (tmp_path / "taken").exists())
        story.go_on(3)
        assert story.lines()[-1]["roles"]["fake"]["workers"] == 1
        story.complete()
        assert len(story.events("start-failed", role="fake")) >= failed

    recipe = quick(
        "ring", "iterations=[6, 100000]", "runtime.fake={min_workers: 1, max_workers: 2}", "runtime.dead_after=10",
        "runtime.placement_timeout=120",
    )  # fmt: skip
    parts = {"fake": partial(stuck_if_told, str(tmp_path))}
    assert Story(recipe, tmp_path / "run", plot, limit_s=360, parts=parts).run().finished is False


def test_a_worker_whose_process_is_stopped_in_its_start_holds_nobody(
    here: None, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP to one of two as soon as it is seen: the run begins without it, and takes another in its place."""
    monkeypatch.setattr(placement, "START_PATIENCE_S", 1.0)
    monkeypatch.setattr(start_patience, "LEAST_START_S", 600.0)
    monkeypatch.setattr(start_patience, "SLOWER", 1.5)
    recipe = quick(
        "ring", "iterations=[6, 100000]", "runtime.fake={min_workers: 1, max_workers: 2}", "runtime.dead_after=10",
        "runtime.placement_timeout=120",
    )  # fmt: skip

    def plot(story: Story) -> None:
        catcher.join(60)
        assert len(caught) == 1 and story.events("started")[0]["workers"]["fake"] == 1
        story.go_on(3)
        monkeypatch.setattr(start_patience, "LEAST_START_S", 5.0)
        story.until(lambda: story.events("start-failed", role="fake"))
        story.complete()

    story = Story(recipe, tmp_path / "run", plot, limit_s=300)
    caught: list[psutil.Process] = []
    catcher = threading.Thread(target=catch, args=("ray::FakeWorker", 2, caught), daemon=True)
    catcher.start()
    assert story.run().finished is False


def catch(title: str, count: int, caught: list[psutil.Process]) -> None:
    """Stop a process of a title that is still in its constructor, as soon as there are so many."""

    def look() -> bool:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if (words := (process.cmdline() or [""])[0]).startswith(title):
                    found.append((process, "__init__" in words))
            except psutil.Error:
                pass
        starting = [process for process, is_starting in found if is_starting]
        if len(found) == count and starting:
            caught.append(starting[-1])
            caught[0].suspend()
        return bool(caught)

    wait_until(look, 90, 0.002)


def never_up(recipe: Any, device: str) -> Any:
    while True:
        time.sleep(0.1)


def test_only_who_has_no_room_waits_for_it(
    here: None, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role that is starting is said to be; one that asks for too much is said to wait for it."""
    monkeypatch.setattr(placement, "SAY_EVERY", 2.0)
    small = ["runtime.placement_timeout=6", "runtime.teacher.cpus=0.25"]
    parts, told = {"teacher": never_up}, io.StringIO()
    with pytest.raises(RunError, match=r"^not up within 6 s: (.+; )?1 teacher worker\(s\) are starting$") as ended:
        distill(quick("ring", *small), tmp_path / "a", console=Console(file=told, width=999), parts=parts)
    assert "starting: " in told.getvalue() and "wait for" not in told.getvalue() + str(ended.value)
    told = io.StringIO()
    with pytest.raises(UserError) as caught:
        recipe = quick("ring", *small, "runtime.fake.resources={tpu: 1}")
        distill(recipe, tmp_path / "b", console=Console(file=told, width=999), parts=parts)
    for words in (told.getvalue(), str(caught.value)):
        assert "1 teacher worker(s) are starting" in words and "1 fake worker(s) wait for 0.25 CPU, 1 tpu each" in words
