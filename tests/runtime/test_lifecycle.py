"""How commands end: nobody reads their output, a signal comes at any moment, their Ray is lost."""

import os
import signal
import time
from pathlib import Path

import pytest
from commands import Command, command

from raydmd.jsonl import read_lines
from raydmd.methods.loading import load_recipe
from raydmd.runs.folders import expert_file
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.preparation import prepare

SMALL = [
    "batch.size=16", "batch.micro=4", "method.fake_updates=3", "checkpoint.every=50", "monitor.samples_every=0",
]  # fmt: skip
LONG = "iterations=4000"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def distill(teachers: dict[str, Path], folder: Path, *more: str) -> list[str]:
    settings = [f"teacher.path={teachers['ring']}", *SMALL, *more]
    return ["distill", "ring", *(word for item in settings for word in ("--set", item)), "--out", str(folder)]


def trains(run: Command, folder: Path, iterations: int = 3) -> None:
    """Wait until it has made some iterations, and note all of its processes."""
    run.until(lambda: len(read_lines(folder / "metrics.jsonl")) >= iterations)
    assert len(run.family()) > 8


def has_all_its_manifest(folder: Path) -> None:
    """The newest manifest is of the last iteration that was written down."""
    newest = Archive(str(folder / "checkpoints")).newest().manifest
    assert newest is not None and newest.iteration == len(read_lines(folder / "metrics.jsonl")) >= 3


def says_ours_only(output: str) -> None:
    """Nothing of Ray's, of Python's or of native code's; those are in run.log."""
    for word in ("Traceback", "*** SIG", "(raylet)", "[2", "Exception ignored", "Token auth", "WARNING", "Error:"):
        assert word not in output, output


def test_its_reader_goes_away(teachers: dict[str, Path], tmp_path: Path) -> None:
    """As `raydmd distill ... | head -1`, with TensorBoard; RAY_ADDRESS is there, and blank."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = distill(teachers, folder, "iterations=40", "monitor.tensorboard=true")
    with command(arguments, log, pipe=True, RAY_ADDRESS="") as run:
        assert run.process.stdout is not None
        while not run.process.stdout.readline().startswith("phase 1  4/40"):
            assert run.process.poll() is None, log.read_text()
        run.process.stdout.close()
        assert run.listening_elsewhere() == []
        stores = [process.pid for process in run.named("gcs_server")]
        while run.process.poll() is None:
            assert [process.pid for process in run.named("gcs_server")] in (stores, [])  # no second Ray
            time.sleep(0.1)
        assert run.ended() == (0, "") and len(stores) == 1
        assert run.outlived() == []
    assert read_lines(folder / "events.jsonl")[-1]["event"] == "finished"
    assert expert_file(folder, 1).is_file()
    assert list(folder.rglob("events.out.tfevents.*"))


def test_streams_that_are_closed_and_sigterm_to_the_group(teachers: dict[str, Path], tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with command(distill(teachers, folder, LONG), log, closed=">&- 2>&-", RAY_ADDRESS="local") as run:
        trains(run, folder)
        assert run.listening_elsewhere() == []
        os.killpg(run.pid, signal.SIGTERM)  # as a service manager does
        assert run.ended() == (143, "")
        assert run.outlived() == []
    has_all_its_manifest(folder)


def test_the_terminal_is_closed(teachers: dict[str, Path], tmp_path: Path) -> None:
    """SIGHUP to the whole foreground group, and from then on nothing can be written or read."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with command(distill(teachers, folder, LONG), log, pipe=True) as run:
        trains(run, folder)
        assert run.process.stdout is not None
        run.process.stdout.close()
        os.killpg(run.pid, signal.SIGHUP)
        assert run.ended() == (130, "")
        assert run.outlived() == []
    has_all_its_manifest(folder)
    notices = folder / "run.log"
    assert not notices.exists() or "Traceback" not in notices.read_text()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_modules_are_imported(teachers: dict[str, Path], tmp_path: Path, number: int) -> None:
    with command(distill(teachers, tmp_path / "run", LONG), tmp_path / "log") as run:
        run.until(lambda: any("/torch/" in each.path for each in run.family()[0].memory_maps()))
        os.killpg(run.pid, number)
        code, output = run.ended(60)
        assert code == (143 if number == signal.SIGTERM else 130)
        assert output.split() == ["raydmd:", "interrupted"]
        assert not (tmp_path / "run").exists()
        assert run.outlived() == []


def test_a_signal_while_ray_starts(teachers: dict[str, Path], tmp_path: Path) -> None:
    with command(distill(teachers, tmp_path / "run", LONG), tmp_path / "log") as run:
        run.until(lambda: run.named("raylet"))
        os.killpg(run.pid, signal.SIGTERM)
        code, output = run.ended(60)
        assert code == 143
        assert output.split() == ["raydmd:", "interrupted"]
        assert run.outlived() == []


def test_a_signal_while_the_teacher_is_trained(tmp_path: Path) -> None:
    settings = [word for item in [*SMALL, LONG, "pretrain.iterations=100000"] for word in ("--set", item)]
    folder = tmp_path / "run"
    with command(["distill", "ring", *settings, "--out", str(folder)], tmp_path / "log") as run:
        run.until(lambda: read_lines(folder / "teacher/pretrain.jsonl"))
        assert run.listening_elsewhere() == []
        run.process.send_signal(signal.SIGINT)
        code, output = run.ended(60)
        assert code == 130 and output.splitlines()[-1] == "raydmd: interrupted"
        says_ours_only(output)
        assert run.outlived() == []


def test_a_second_ctrl_c_ends_at_once(teachers: dict[str, Path], tmp_path: Path) -> None:
    """The first waits for the iteration's end, which does not come: the generator stands still."""
    folder = tmp_path / "run"
    with command(distill(teachers, folder, LONG), tmp_path / "log") as run:
        trains(run, folder)
        (generator,) = run.named("ray::GeneratorWorker")
        generator.suspend()
        os.killpg(run.pid, signal.SIGINT)
        run.until(lambda: "stopping at" in run.log.read_text())
        os.killpg(run.pid, signal.SIGINT)
        began = time.monotonic()
        code, output = run.ended(60)
        assert code == 130 and time.monotonic() - began < 10
        says_ours_only(output)
        assert run.outlived() == []


@pytest.mark.parametrize("which", ["raylet", "gcs_server"])
def test_ray_is_lost(teachers: dict[str, Path], tmp_path: Path, which: str) -> None:
    folder = tmp_path / "run"
    with command(distill(teachers, folder, LONG), tmp_path / "log") as run:
        trains(run, folder)
        (lost,) = run.named(which)
        before = run.log.read_text()
        lost.kill()
        began = time.monotonic()
        code, output = run.ended(60)
        assert code == 1 and time.monotonic() - began < 15
        *progress, line = output.removeprefix(before).splitlines()
        assert line.startswith("raydmd: Ray's ") and which in line and "the same command goes on" in line
        assert all(said.startswith(("phase ", "lost ")) for said in progress)  # its workers go before it, or after
        says_ours_only(output)
        assert run.outlived() == []


def test_a_signal_while_workers_wait_for_their_place(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of the cluster's can take one of them; what is there of the run stands in nobody's way."""
    folder = tmp_path / "run"
    nowhere = distill(teachers, folder, LONG, "runtime.fake.resources={tpu: 1}")
    with command(nowhere, tmp_path / "log") as run:
        run.until(lambda: "1 tpu" in run.log.read_text())
        os.killpg(run.pid, signal.SIGTERM)
        code, output = run.ended(60)
        assert code == 143 and output.splitlines()[-1] == "raydmd: interrupted"
        says_ours_only(output)
        assert run.outlived() == []
    assert not list(folder.rglob("run.lock"))
    assert prepare(load_recipe("ring", [f"teacher.path={teachers['ring']}"]), folder, "auto") is not None


OTHERS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "{run}", "--samples", "1000000"],
    "generate": ["generate", "{run}", "--prompt", "7", "-n", "1000000", "--out", "{out}"],
    "report": ["report", "{run}", "--out", "{out}/page.html"],
    "bench": ["bench", "serve", "--run", "{run}", "--concurrency", "1", "--requests", "1000000"],
}


@pytest.mark.parametrize("which", OTHERS)
def test_a_signal_in_the_other_commands(which: str, served_runs: dict[str, Path], tmp_path: Path) -> None:
    """While torch is at work, or, where that is soon over, while it is imported."""
    number = {"generate": signal.SIGHUP, "bench": signal.SIGINT}.get(which, signal.SIGTERM)
    words = [word.format(run=served_runs["full"], out=tmp_path / "out") for word in OTHERS[which]]
    with command(words, tmp_path / "log") as run:
        run.until(lambda: any("/torch/" in each.path for each in run.family()[0].memory_maps()))
        if which != "report":
            run.until(lambda: run.family()[0].cpu_times().user > 5)
        run.process.send_signal(number)
        code, output = run.ended(60)
        assert code == (143 if number == signal.SIGTERM else 130), output
        says_ours_only(output)
        assert run.outlived() == []
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
