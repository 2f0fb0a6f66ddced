"""The run's helpers fall silent, and storage hangs: the run goes on, or ends when it is told to, and loses little."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbed import Story, assert_bits_of_the_reference, head_alone, wait_until
from rich.console import Console

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.errors import RunError
from raydmd.jsonl import read_lines
from raydmd.runtime.checkpoint import queue as checkpoint_queue
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.launch import distill

LONG = ["iterations=[6, 100000]", "checkpoint.every=10"]
HELPERS = {"prompt stream": "PromptStream", "checkpoint writer": "CheckpointWriter", "control caller": "ControlCaller"}


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    with head_alone(4):
        yield


def stop(story: Story, name: str) -> Any:
    (process,) = story.processes(name)
    process.suspend()
    return process


def test_helpers_and_workers_that_are_silent_are_replaced(here: None, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """SIGSTOP: no connection closes, nobody is told. Every helper is killed and started again, and what it was asked
    is done; then a scorer is treated as dead, and a trainer of each role, for whom its peer waits.
    """

    def plot(story: Story) -> None:
        story.go_on(8)
        stopped = [stop(story, name) for name in HELPERS.values()]
        for helper in HELPERS:
            wait_until(lambda helper=helper: story.events("helper-recovered", helper=helper), 90)
            (lost,) = story.events("helper-lost", helper=helper)
            assert lost["why"] == "did not answer for over 5 s"
        assert not any(process.is_running() for process in stopped)
        story.go_on(15)  # over a checkpoint
        story.kill("fake", 0, 1)  # a whole group: the writer and the caller are needed
        (recovered,) = story.lost_and_recovered(2)[-1:]
        assert recovered["how"] == "rolled_back"
        assert [event["role"] for event in story.events("worker-lost")] == ["fake", "fake"]  # nobody else was blamed
        story.complete()
        for count, role in enumerate(("teacher", "fake", "generator"), start=3):
            os.kill(story.pids(role)[0], signal.SIGSTOP)
            (recovered,) = story.lost_and_recovered(count)[-1:]
            assert recovered["roles"] == [role] and recovered["steps_lost"] == 0
            assert "did not answer for over 5 s" in story.events("worker-lost")[-1]["why"]
            story.go_on(3)

    several = [f"runtime.{role}.max_workers=2" for role in ("teacher", "fake", "generator")]
    story = Story(quick("ring", *LONG, *several, "runtime.dead_after=5"), tmp_path / "run", plot).run()
    assert_bits_of_the_reference(story, prompts)


def test_at_most_one_interval_is_lost_while_the_writer_is_away(
    here: None, quick: Any, prompts: Any, tmp_path: Path
) -> None:
    """The writer stands still over three edges, then dies together with a group's only worker."""

    def plot(story: Story) -> None:
        story.go_on(12)
        writer = stop(story, "CheckpointWriter")
        story.go_on(35)
        writer.kill()
        story.kill("fake")
        (recovered,) = story.lost_and_recovered(1)
        assert recovered["how"] == "rolled_back" and 0 <= recovered["steps_lost"] <= 10
        story.go_on(3)

    story = Story(quick("ring", *LONG), tmp_path / "run", plot).run()
    assert_bits_of_the_reference(story, prompts)


class Hanging:
    """A run whose storage hangs when the first phase's expert is to be recorded: a pipe that nobody reads."""

    def __init__(self, quick: Any, folder: Path, *more: str) -> None:
        self.pipe = folder / "store/experts/phase-1.json.part"
        self.pipe.parent.mkdir(parents=True)
        os.mkfifo(self.pipe)
        self.recipe = quick("ring", *LONG, f"checkpoint.path={folder}/store", *more)


def test_a_phase_goes_on_without_storage_that_hangs(here: None, quick: Any, prompts: Any, tmp_path: Path) -> None:
    hanging = Hanging(quick, tmp_path, "runtime.dead_after=5")

    def plot(story: Story) -> None:
        wait_until(lambda: story.events("checkpoint-late"), 90)
        (late,) = story.events("checkpoint-late")
        assert (late["phase"], late["iteration"]) == (1, 6)
        story.go_on(20)
        assert all(event["iteration"] < 6 for event in story.events("checkpoint"))
        story.until(lambda: story.events("helper-lost", helper="checkpoint writer"))
        assert "save_expert" in story.events("helper-lost", helper="checkpoint writer")[0]["why"]
        hanging.pipe.unlink()
        story.until(lambda: story.events("checkpoint"))

    story = Story(hanging.recipe, tmp_path / "run", plot).run()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "store")
    assert_bits_of_the_reference(story, prompts)


def test_ctrl_c_ends_a_run_whose_storage_hangs(
    here: None, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_queue, "STOP_PATIENCE_S", 2.0, raising=False)
    hanging, told = Hanging(quick, tmp_path), io.StringIO()
    story = Story(hanging.recipe, tmp_path / "run", lambda story: None)

    def interrupt() -> None:
        wait_until(lambda: len(story.lines()) == 6, 90)
        time.sleep(1)  # it waits for storage now, or soon
        os.kill(os.getpid(), signal.SIGINT)

    ended = interrupted(interrupt, lambda: distill(hanging.recipe, story.folder, console=Console(file=told, width=999)))
    assert ended is False
    assert "not written, for its storage does not get on" in told.getvalue()
    assert read_lines(story.folder / "events.jsonl")[-1]["event"] == "stopped"
    hanging.pipe.unlink()
    assert distill(hanging.recipe, story.folder, console=Console(quiet=True), until=8) is False  # the same goes on
    assert len(story.lines()) == 8


def test_ctrl_c_ends_a_run_whose_helpers_are_silent(here: None, quick: Any, tmp_path: Path) -> None:
    """Nobody has noticed it yet: prompts do not come, and neither do the caller's answers."""
    recipe, told = quick("ring", *LONG, "runtime.dead_after=300"), io.StringIO()
    story, stopped = Story(recipe, tmp_path / "run", lambda story: None), [None][:0]

    def interrupt() -> None:
        wait_until(lambda: len(story.lines()) >= 8, 90)
        stopped.extend(stop(story, HELPERS[name]) for name in ("prompt stream", "control caller"))
        os.kill(os.getpid(), signal.SIGINT)

    try:
        ended = interrupted(interrupt, lambda: distill(recipe, story.folder, console=Console(file=told, width=999)))
    finally:
        for process in stopped:
            process.kill()  # type: ignore[attr-defined]
    assert ended is False and "stopping at" in told.getvalue()
    assert read_lines(story.folder / "events.jsonl")[-1]["event"] == "stopped"
    newest = Archive(str(story.folder / "checkpoints")).newest().manifest
    assert newest is not None and newest.iteration == len(story.lines()) >= 8


def interrupted(tell: Callable[[], None], run: Callable[[], bool]) -> bool | None:
    """Run with ``tell`` in a thread; None: it had to be ended by a second Ctrl-C, a minute later."""
    over = threading.Event()

    def both() -> None:
        tell()
        if not over.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    try:
        return run()
    except KeyboardInterrupt:
        return None
    finally:
        over.set()
        thread.join()


def test_a_run_is_not_finished_before_its_experts_are_stored(
    here: None, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_queue, "START_S", 3.0)
    hanging = Hanging(quick, tmp_path, "runtime.dead_after=3", "iterations=[2, 1]")
    with pytest.raises(RunError, match=r"checkpoint.path: .*the expert of phase 1.*not written"):
        distill(hanging.recipe, tmp_path / "run", console=Console(quiet=True))
    hanging.pipe.unlink()
    assert distill(hanging.recipe, tmp_path / "run", console=Console(quiet=True)) is True
    found = Archive(str(tmp_path / "store")).newest().manifest
    assert found is not None and (found.iteration, found.experts) == (3, 2)
