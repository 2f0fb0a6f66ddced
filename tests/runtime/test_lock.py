"""Locks: one driver a folder, whatever way it ends; a dead driver's lock is taken over by one of those who want it."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raydmd.cli import run as command
from raydmd.errors import StorageError, UserError
from raydmd.methods.loading import load_recipe
from raydmd.runtime.checkpoint import lock as locks
from raydmd.runtime.checkpoint.lock import LOCK, Claim, Lock, Owner, claim_run
from raydmd.runtime.launch import distill
from raydmd.runtime.pretrain import pretrain


def owner_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / LOCK).read_text()))


def write_lock(folder: Path, age_s: float = 0.0, **changes: Any) -> None:
    """Leave a lock as this process would write it, with some of its values changed and its heartbeat so old."""
    made = Lock(str(folder), "--out x", "somebody")
    made.acquire()
    path = folder / LOCK
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def claim(folder: Path) -> Claim:
    return Claim([(f"--out {folder}", str(folder))])


def test_a_second_claim_is_refused_in_one_line_and_the_first_one_gives_the_lock_up(tmp_path: Path) -> None:
    folder = tmp_path / "new/run"
    with claim(folder) as held:
        found = owner_in(folder)
        assert found["owner"] == held.owner and found["pid"] == os.getpid() and found["host"] == socket.gethostname()
        with pytest.raises(
            UserError, match=rf"^--out {folder}: another driver is at work on it \(process \d+ on "
        ) as e:
            claim(folder).__enter__()
        assert "\n" not in str(e.value) and owner_in(folder)["owner"] == held.owner
        held.check()
    assert not (tmp_path / "new").exists()  # nothing came into what was made for the lock
    folder.mkdir(parents=True)
    (folder / "mine").write_text("")
    with pytest.raises(ZeroDivisionError), claim(folder):
        raise ZeroDivisionError
    assert os.listdir(folder) == ["mine"]


def test_a_place_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out .*/file: there is a file of that name; a folder is needed$"):
        claim(tmp_path / "file").__enter__()
    with pytest.raises(UserError, match=r"^--out .*/file/below: it cannot be locked: .*Not a directory"):
        claim(tmp_path / "file/below").__enter__()
    assert os.listdir(tmp_path) == ["file"]


def test_all_locks_or_none(tmp_path: Path) -> None:
    """A place of checkpoints is shared by two runs with folders of their own: the second gets neither lock."""
    place = str(tmp_path / "checkpoints")
    with claim_run(tmp_path / "a", place):
        with pytest.raises(UserError, match=rf"^checkpoint\.path: {place}: another driver is at work on it"):
            claim_run(tmp_path / "b", place).__enter__()
        assert not (tmp_path / "b").exists() and (tmp_path / "a" / LOCK).is_file()


ALIVE = {
    "this process": {},
    "a process elsewhere": {"machine": "another", "age_s": 30.0},
}
DEAD = {
    "a process that is gone": {"pid": 2**22 + 1},
    "another process with its number": {"started": 1},
    "a process elsewhere, silent for long": {"machine": "another", "age_s": 61.0},
}


@pytest.mark.parametrize("who", [*ALIVE, *DEAD])
def test_who_is_dead_and_who_is_not(who: str, tmp_path: Path) -> None:
    write_lock(tmp_path, **{**ALIVE, **DEAD}[who])
    if who in DEAD:
        with claim(tmp_path) as held:
            assert owner_in(tmp_path)["owner"] == held.owner
        assert os.listdir(tmp_path) == []
    else:
        with pytest.raises(UserError, match="another driver is at work"):
            claim(tmp_path).__enter__()
        assert owner_in(tmp_path)["owner"] == "somebody"


def test_how_long_a_silent_driver_elsewhere_is_waited_for_is_said(tmp_path: Path) -> None:
    write_lock(tmp_path, machine="another", host="far", age_s=40.0)
    with pytest.raises(UserError, match=r"process \d+ on far, since .*the same command goes on (19|20|18) s from now"):
        claim(tmp_path).__enter__()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"owner": 3}'])
def test_half_a_lock_stands_while_it_is_fresh(content: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(content)
    with pytest.raises(UserError, match="on an unknown host"):
        claim(tmp_path).__enter__()
    os.utime(path, (time.time() - 61, time.time() - 61))
    with claim(tmp_path):
        pass


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has taken notice
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[0] == "Z"
    write_lock(tmp_path, pid=child.pid, started=int(fields[19]))
    with claim(tmp_path):
        pass
    child.wait()


def test_a_heartbeat_keeps_a_lock_and_finds_out_that_it_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    path = tmp_path / LOCK
    with claim(tmp_path) as held:
        os.utime(path, (1, 1))
        until(lambda: path.stat().st_mtime > 1)
        path.unlink()  # somebody cleans up
        until(path.exists)
        assert owner_in(tmp_path)["owner"] == held.owner
        held.check()
        path.write_text(json.dumps({**owner_in(tmp_path), "owner": "another", "host": "far"}))
        until(lambda: held.locks[0].lost)
        with pytest.raises(StorageError, match=r"another driver has taken it over \(process \d+ on far"):
            held.check()
    assert owner_in(tmp_path)["owner"] == "another"  # not given up by who does not have it


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def race(folder: str, gate: Any, results: Any) -> None:
    gate.wait()
    mine = claim(Path(folder))
    try:
        mine.__enter__()
    except UserError as error:
        results.put(str(error))
        return
    results.put(None)
    threading.Event().wait()  # until it is killed


@pytest.mark.parametrize("before", ["nothing", "a dead driver's lock"])
def test_of_many_starters_one_wins(before: str, tmp_path: Path) -> None:
    context, starters = multiprocessing.get_context("fork"), 6
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        if before != "nothing":
            folder.mkdir()
            write_lock(folder, pid=2**22 + 1)
        gate, results = context.Event(), context.Queue()
        processes = [context.Process(target=race, args=(str(folder), gate, results)) for _ in range(starters)]
        for process in processes:
            process.start()
        gate.set()
        answers = [results.get(timeout=60) for _ in processes]
        assert answers.count(None) == 1, answers
        assert all("another driver is at work" in answer for answer in answers if answer is not None)
        winner = next(process for process in processes if process.pid == owner_in(folder)["pid"])
        assert winner.is_alive()
        for process in processes:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        with claim(folder):  # the winner was killed: its lock is there, and stands in nobody's way
            pass


def test_an_owner_tells_what_it_is() -> None:
    me = Owner("x", socket.gethostname(), locks._machine(), os.getpid(), locks._started(os.getpid()) or 0, time.time())
    assert me.on_this_machine() and me.runs()


# --- the commands

RUN = "from raydmd.cli import main; main()"


def test_every_command_that_writes_a_run_is_refused_while_another_driver_is_at_work(
    quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started: the folder, the place of checkpoints, a teacher's folder."""
    quiet, recipe = Console(quiet=True), quick("ring")
    place = recipe.checkpoint.model_copy(update={"path": str(tmp_path / "place")})
    write_lock_of_another(tmp_path / "run")
    write_lock_of_another(tmp_path / "place")
    with pytest.raises(UserError, match=f"^--out {tmp_path}/run: another driver is at work on it"):
        distill(recipe, tmp_path / "run", console=quiet)
    with pytest.raises(UserError, match=rf"^checkpoint\.path: {tmp_path}/place: another driver is at work on it"):
        distill(recipe.model_copy(update={"checkpoint": place}), tmp_path / "other", console=quiet)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=f"^--out {tmp_path}/run: another driver is at work on it"):
        pretrain(load_recipe("ring"), tmp_path / "run", quiet)
    for arguments in (["quickstart"], ["distill", "digits"], ["pretrain", "digits"]):
        assert command([*arguments, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"raydmd: --out {tmp_path}/run: another driver") and error.count("\n") == 1
    assert os.listdir(tmp_path / "run") == os.listdir(tmp_path / "place") == [LOCK]


def write_lock_of_another(folder: Path) -> None:
    write_lock(folder, machine="another")
