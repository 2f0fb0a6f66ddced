"""What `raydmd status` shows of a run: at work, recovering, ended, and of a driver that is gone."""

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import command
from disturbed import Story, head_alone, wait_until

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.cli import app
from raydmd.cli import run as run_command
from raydmd.runs.status import STATUS, RunStatus, describe, read_status
from raydmd.runtime.recovery.state import ENDS, RunState, State


def test_a_change_that_there_is_not_is_made_and_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "raydmd")
    run = RunState()
    since = run.since
    run.enter(State.STARTING, "again")
    assert run.since == since and caplog.records == []
    run.enter(State.RUNNING)
    run.enter(State.RECOVERING, "generator 1: its process was killed or crashed")
    run.enter(State.RUNNING)
    run.enter(State.REWINDING)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("INFO", "starting -> running"),
        ("INFO", "running -> recovering: generator 1: its process was killed or crashed"),
        ("INFO", "recovering -> running"),
        ("ERROR", "running -> rewinding (there is no such change)"),
    ]
    assert run.state == State.REWINDING


@pytest.mark.parametrize("meanwhile", [State.RUNNING, State.RECOVERING, State.REWINDING, State.RESIZING])
def test_a_run_that_is_to_stop_stays_so_until_its_end(meanwhile: State) -> None:
    run = RunState()
    run.enter(State.STOPPING)
    run.enter(meanwhile)
    assert run.state == State.STOPPING
    run.enter(State.STOPPED)
    assert run.state in ENDS


def test_a_run_shows_its_workers_and_that_it_recovers(quick: Any, tmp_path: Path) -> None:
    """A killed worker is replaced and the states are those of the table; the last status is that of the end."""
    states: set[str] = set()

    def status() -> RunStatus:
        found = read_status(story.folder)
        states.add(found.state)
        return found

    def plot(story: Story) -> None:
        story.go_on(3)
        story.until(lambda: any(w.call for facts in status().roles.values() for w in facts.workers))
        found = status()
        assert not found.is_stale() and found.pid == os.getpid() and found.last_commit is not None
        assert {role: facts.active for role, facts in found.roles.items()} == {"teacher": 1, "fake": 2, "generator": 1}
        assert found.roles["teacher"].generation is None
        fake = found.roles["fake"]
        assert fake.generation == 1 and {worker.pid for worker in fake.workers} == set(story.pids("fake"))
        assert found.iterations == 100006 and found.phases == 2
        shown = describe(Path("runs/a"), found)
        assert shown[0].startswith(f"runs/a: {found.state} for ") and "of 100006 iterations" in shown[1]
        assert "fake: 2 of 1 to 2 workers at work, generation 1" in shown
        story.kill("fake")
        story.lost_and_recovered(1)
        story.complete()
        story.until(lambda: status().roles["fake"].active == 2 and status().roles["fake"].generation == 3)

    recipe = quick("ring", "iterations=[6, 100000]", "runtime.fake.max_workers=2")
    story = Story(recipe, tmp_path / "run", plot)
    with head_alone(4):
        story.run()
    last = read_status(story.folder)
    assert (last.state, last.iteration) == ("stopped", story.lines()[-1]["iteration"] + 1)
    assert last.has_ended and "teacher" not in " ".join(describe(story.folder, last))
    assert "running" in states


def test_a_driver_that_is_gone_leaves_a_status_that_is_said_to_be_stale(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = ["distill", "ring", "--out", str(folder), "--set", f"teacher.path={teachers['ring']}",
             "--set", "iterations=[100000, 100000]"]  # fmt: skip
    with command(words, tmp_path / "log") as driver:
        driver.until(lambda: (folder / STATUS).exists())
        assert read_status(folder).state == "starting"
        driver.until(lambda: read_status(folder).state == "running" and read_status(folder).iteration > 3)
        shown = CliRunner().invoke(app, ["status", str(folder)])
        assert shown.exit_code == 0 and "running for" in shown.output and "stale" not in shown.output
        driver.family()  # all of it is ended with the test
        driver.process.send_signal(signal.SIGKILL)
        driver.process.wait(30)
        wait_until(lambda: read_status(folder).is_stale())
        lines = describe(folder, read_status(folder))
        assert lines[0].startswith(f"stale: process {driver.pid} on ")
        assert lines[0].endswith("it is gone; the same command goes on")
        assert "-> running" in (folder / "run.log").read_text()


def _status(**changes: Any) -> RunStatus:
    fields = {
        "written": time.time(), "host": "a", "pid": 1, "state": "running", "since": time.time(), "why": "",
        "iteration": 1, "iterations": 2, "phase": 1, "phases": 1, "last_commit": None, "seconds_left": None,
        "pending_calls": 0, "waiting_for": [], "roles": {},
    }  # fmt: skip
    return RunStatus(**{**fields, **changes})


def test_of_another_machine_it_is_not_known_what_became_of_the_driver() -> None:
    old = _status(written=time.time() - 60, host="another-machine", pid=os.getpid())
    assert describe(Path("run"), old)[0].endswith("ago; it is gone, or its disk takes nothing")
    assert not _status(written=time.time() - 60, state="finished").is_stale()
    assert not _status(written=time.time() + 60).is_stale()  # another machine's clock


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "it has no status.json; is it a run's folder?"),
        ("", "broken"), ("[]", "broken"), ('{"state": "running"}', "broken"), ("\x00\xff", "broken"),
        (_status(roles={}).model_dump_json().replace('"roles":{}', '"roles":{"fake":[]}'), "broken"),
    ],
)  # fmt: skip
def test_what_is_no_status_is_said_in_a_line(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / STATUS).write_text(content, encoding="latin-1")
    assert run_command(["status", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raydmd: ") and words in line


def test_programs_read_it_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STATUS).write_text(_status(state="finished", iteration=2).model_dump_json())
    assert run_command(["status", str(tmp_path), "--json", "--watch"]) == 0  # a run that has ended ends the watch
    assert json.loads(capsys.readouterr().out)["iteration"] == 2
