"""Disks that are full or gone: one line, nothing half-written left, and after room is made it goes on."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disturbed import head_alone, wait_until
from full_disk import SmallDisk, half_written, small_disk
from mortal import Save, SaveExpert, expert, is_of, manifest, same, shards
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from safetensors.torch import save_file

from raydmd.atomic import remove_parts, replacing, write_text
from raydmd.cli import run as command
from raydmd.data.prompts import write_prompts
from raydmd.errors import RunError, StorageError, UserError
from raydmd.evaluation.pictures import save_png
from raydmd.jsonl import LineWriter, mend_lines, read_lines
from raydmd.methods.local import train
from raydmd.runs.folders import expert_file
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.lock import Lock
from raydmd.runtime.checkpoint.manager import Archive, Writer
from raydmd.runtime.checkpoint.writer import CheckpointWriter, keep_experts
from raydmd.runtime.launch import distill
from raydmd.runtime.preparation import prepare
from raydmd.runtime.pretrain import salvage

QUIET = Console(quiet=True)
FULL = "No space left on device; make room, and the same command goes on"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 256) as made:
        yield made


# --- files

BIG = np.random.default_rng(0).integers(0, 255, (512, 512, 3)).astype(np.uint8)
WRITES: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text(path, "x" * 500_000),
    "a picture": lambda path: save_png(Image.fromarray(BIG), path),
    "a table": lambda path: write_prompts(path, {"index": np.random.default_rng(0).integers(0, 2**62, 60_000)}),
}


def tensors(path: Path) -> None:
    with replacing(path) as part:
        save_file({"w": torch.ones(300_000)}, part)


WRITES["safetensors"] = tensors


@pytest.mark.parametrize("what", WRITES)
def test_a_file_is_whole_or_not_there(what: str, disk: SmallDisk) -> None:
    path = disk.path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match=f"^{path}: {FULL}$"):
        WRITES[what](path)
    assert path.read_text() == "old" and os.listdir(disk.path) == ["file"]
    disk.resize(4096)
    WRITES[what](path)
    assert path.stat().st_size > 256 * 1024 and os.listdir(disk.path) == ["file"]


def test_a_disk_that_turned_read_only_is_said_to_be_gone(disk: SmallDisk) -> None:
    path = disk.path / "file"
    disk.protect(writable=False)
    with pytest.raises(StorageError, match=f"^{path}: Read-only file system; .* when its storage is back$"):
        write_text(path, "x")
    disk.protect(writable=True)
    write_text(path, "x")


def test_a_limit_on_a_files_size_is_a_full_disk_too(tmp_path: Path) -> None:
    """Where nothing can be mounted: the kernel refuses more than a process's limit in the same way."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))

    code = "from pathlib import Path; from raydmd.atomic import write_text; write_text(Path('big'), 'x' * 10**6)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, preexec_fn=limit
    )
    assert "StorageError: big: File too large; make room" in done.stderr and os.listdir(tmp_path) == []


def test_parts_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for name in (f".a.{child.pid}.part", ".b.4194305.part", "recipe.yaml.part", f".c.{os.getpid()}.part", "keep"):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([f".a.{child.pid}.part", "keep"])
    child.communicate(b"\n")


# --- lines


def test_a_line_is_whole_or_not_there(disk: SmallDisk) -> None:
    path = disk.path / "events.jsonl"
    filler = disk.fill(left=4096)
    records = [{"n": n, "words": "w" * 300} for n in range(20)]
    with LineWriter(path) as writer:
        with pytest.raises(StorageError, match=f"^{path}: {FULL}$"):
            for record in records:
                writer.append(record)
        written = len(read_lines(path))
        assert 5 < written < 20 and path.read_bytes().endswith(b"}\n")
        filler.unlink()
        for record in records[written:]:
            writer.append(record)
    assert read_lines(path) == records


def test_lines_of_a_file_that_was_removed_are_not_lost_in_silence(tmp_path: Path) -> None:
    with LineWriter(tmp_path / "metrics.jsonl") as writer:
        writer.append({"n": 1})
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.raises(StorageError, match="metrics.jsonl: it was removed while the run wrote to it"):
            writer.append({"n": 2})


TORN = {
    "nothing": (b"", 0),
    "half a line": (b'{"n": 9, "m', 1),
    "a whole line without its end": (b'{"n": 1}', 0),
    "zeros after a power cut": (b"\0" * 50, 1),
    "no utf-8": (b'\xff\xfe\n{"n": 1}\n', 1),
    "no records": (b'3\n"x"\nnull\n[]\n{"n": 1}\n', 4),
    "records of something else": (b'{"m": 1}\n{"n": "1"}\n', 2),
}


@pytest.mark.parametrize("what", TORN)
def test_torn_lines_are_removed_and_counted_wherever_they_are(what: str, tmp_path: Path) -> None:
    path, (torn, count) = tmp_path / "metrics.jsonl", TORN[what]
    path.write_bytes(b'{"n": 0}\n' + torn)

    def wanted(record: dict[str, Any]) -> bool | None:
        return record["n"] < 5 if type(record.get("n")) is int else None

    assert mend_lines(path, wanted) == count
    assert mend_lines(path, wanted) == 0
    with LineWriter(path) as writer:
        writer.append({"n": 2})
    whole = [{"n": 0}, *([{"n": 1}] if b'{"n": 1}' in torn else []), {"n": 2}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole == read_lines(path)
    assert mend_lines(path, lambda record: record["n"] < 2) == 0 and {"n": 2} not in read_lines(path)


def test_lines_written_twice_are_there_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n": 0, "x": 1}\n{"n": 1}\n{"n": 0, "x": 2}\n')
    assert mend_lines(path, key="n") == 0 and read_lines(path) == [{"n": 0, "x": 2}, {"n": 1}]


# --- archives


def test_a_save_on_a_full_disk_leaves_nothing_and_the_checkpoint_before(disk: SmallDisk) -> None:
    folder = disk.path / "checkpoints"
    archive = Archive(str(folder), keep=3)
    Save(2)(archive)
    before = sorted(str(path) for path in folder.rglob("*"))
    for left in (0, 4096, 16384, 24576):  # the folder, the first shard, the second, the manifest
        filler = disk.fill(left)
        with pytest.raises(StorageError, match=rf"^checkpoint\.path: {folder}: {FULL}$"):
            Save(4)(archive)
        assert sorted(str(path) for path in folder.rglob("*")) == before
        assert is_of(Archive(str(folder)).newest(), 2)
        with pytest.raises(StorageError):
            archive.save_expert(0, {"w": np.ones(100_000)})
        assert sorted(str(path) for path in folder.rglob("*")) == before
        filler.unlink()
    Save(4)(archive)
    assert is_of(archive.newest(), 4) and not half_written(folder)


def test_a_disk_that_is_gone_in_a_run(disk: SmallDisk) -> None:
    archive = Archive(str(disk.path / "checkpoints"))
    Save(2)(archive)
    disk.protect(writable=False)
    with pytest.raises(StorageError, match="Read-only file system; the same command goes on when its storage is back"):
        Save(4)(archive)
    disk.protect(writable=True)
    Save(4)(archive)
    assert is_of(archive.newest(), 4)


def checkpoint_writer(folder: Path) -> CheckpointWriter:
    made = CheckpointWriter.__new__(CheckpointWriter)  # not niced: this is the tests' own process
    made.folder, made.archive = folder, Archive(str(folder / "checkpoints"), 2, None, folder)
    return made


@pytest.mark.parametrize("restarted", [False, True])
def test_checkpoints_removed_in_a_run_are_whole_again_with_the_next(restarted: bool, tmp_path: Path) -> None:
    """A finished expert is not written again by itself: it comes from the run's own copy."""
    writer = checkpoint_writer(tmp_path)
    writer.save_expert(0, expert(7))
    Save(4, (7,))(writer.archive)
    for path in sorted((tmp_path / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "checkpoints").rmdir()
    writer = checkpoint_writer(tmp_path) if restarted else writer
    Save(6, (7,))(writer.archive)
    assert is_of(Archive(str(tmp_path / "checkpoints")).newest(), 6, (7,))
    expert_file(tmp_path, 0).unlink()  # and without that copy it is said, not written around
    (tmp_path / "checkpoints/experts").rename(tmp_path / "away")
    with pytest.raises(RunError, match="lost the expert of phase 1, and the run's folder lacks it"):
        Save(8, (7,))(checkpoint_writer(tmp_path).archive)


def test_an_expert_that_the_archive_lost_is_restored_from_the_run_and_the_other_way_round(tmp_path: Path) -> None:
    writer, here = checkpoint_writer(tmp_path), expert_file(tmp_path, 0)
    writer.save_expert(0, expert(7))
    Save(4, (7,), edge=True)(writer.archive)
    (there,) = (tmp_path / "checkpoints/experts").glob("*.safetensors")
    for broken, whole in ((there, here), (here, there)):
        content = bytearray(broken.read_bytes())
        content[-1] ^= 1
        broken.write_bytes(content)
        assert Archive(str(tmp_path / "checkpoints")).newest().manifest is None or broken is here
        found = checkpoint_writer(tmp_path).archive.newest()
        assert is_of(found, 4, (7,), edge=True) and not found.skipped
        assert found.manifest is not None
        keep_experts(tmp_path, found.manifest, found.shards)
        assert broken.read_bytes() == whole.read_bytes() and same(load_file(here), expert(7))


def test_two_writers_never_delete_what_the_other_wrote(tmp_path: Path) -> None:
    """Without a lock, or in spite of it: one behind, and one between the other's two shards."""
    one, two = Archive(str(tmp_path)), Archive(str(tmp_path))
    Save(100)(one)
    Save(105)(one)
    Save(50)(two)
    assert is_of(two.newest(), 105)
    two = Archive(str(tmp_path))
    write = one.store.write

    def between(path: str, content: Any) -> tuple[str, int]:
        written = write(path, content)
        if path.endswith("generator.safetensors"):
            Save(55)(two)
        return written

    one.store.write = between  # type: ignore[method-assign]
    Save(110)(one)
    found = Archive(str(tmp_path)).newest()
    assert is_of(found, 110) and not found.skipped
    names = sorted(path.name for path in tmp_path.glob("step-*.json"))
    assert names == [f"step-{n:06d}.json" for n in (50, 55, 105, 110)]  # its own 100 the first one dropped


def test_nothing_is_written_while_another_driver_has_the_lock(tmp_path: Path) -> None:
    orphan, driver = Archive(str(tmp_path), writer=Writer("old")), Archive(str(tmp_path), writer=Writer("new"))
    Save(4)(orphan)
    Lock(str(tmp_path), "--out x", "new").acquire()  # its driver died, and another goes on
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    calls = [partial(Save(6), orphan), partial(SaveExpert(0, 7), orphan), partial(orphan.write_text, "recipe.yaml", "")]
    for call in calls:
        with pytest.raises(StorageError, match=rf"^checkpoint\.path: {tmp_path} is another driver's now \(process \d+"):
            call()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    Save(6)(driver)
    assert is_of(driver.newest(), 6)


# --- starts


def blocked(recipe: Any, folder: Path) -> str | None:
    try:
        prepare(recipe, folder, "auto")
    except UserError as error:
        return str(error)
    return None


LEFT: dict[str, list[tuple[str, str]]] = {
    "half a recipe": [("recipe.yaml.part", "na"), (".recipe.yaml.4194305.part", "")],
    "an empty recipe": [("recipe.yaml", "")],
    "half a recipe under its name": [("recipe.yaml", "name: [")],
    "a dead driver's lock": [("run.lock", "{}"), ("checkpoints/run.lock", "")],
    "another recipe, and nothing made by it": [("recipe.yaml", "name: other\nseed: 5\n"), ("events.jsonl", "")],
}


@pytest.mark.parametrize("what", LEFT)
def test_what_a_failed_start_left_stands_in_nobodys_way(what: str, quick: Any, tmp_path: Path) -> None:
    for name, content in LEFT[what]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert blocked(quick("ring"), tmp_path) is None
    assert "seed: 0" in (tmp_path / "recipe.yaml").read_text() and not list(tmp_path.glob("*.part"))


def test_what_was_made_by_another_recipe_still_does(quick: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    assert "it is not empty and holds no run" in (blocked(quick("ring"), tmp_path) or "")
    (tmp_path / "mine").unlink()
    prepare(quick("ring"), tmp_path, "auto")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    assert "a run of another recipe (seed: 0 there, 5 here)" in (blocked(quick("ring", "seed=5"), tmp_path) or "")
    (tmp_path / "metrics.jsonl").unlink()
    assert blocked(quick("ring", "seed=5"), tmp_path) is None
    archive = Archive(str(tmp_path / "checkpoints"))
    archive.save(manifest(2), shards(2))
    assert "another recipe" in (blocked(quick("ring", "seed=6"), tmp_path) or "")
    (tmp_path / "recipe.yaml").write_text("")
    assert "its recipe.yaml is empty; put it back" in (blocked(quick("ring", "seed=5"), tmp_path) or "")


def test_a_start_on_a_full_disk(quick: Any, disk: SmallDisk) -> None:
    """From no byte left to some: the lock, the folder, the recipe; each time one line, and nothing that blocks."""
    recipe, folder = quick("ring"), disk.path / "run"
    for left in (0, 4096, 8192):
        filler = disk.fill(left)
        with pytest.raises(StorageError, match=rf"^.*: {FULL}$"):
            distill(recipe.model_copy(update={"name": "n" * 9000}), folder, console=QUIET)
        assert not (folder / "recipe.yaml").exists() and not (folder / "run.lock").exists()
        assert not folder.exists() or not half_written(folder)
        filler.unlink()
    assert blocked(recipe, folder) is None


def test_a_command_on_a_full_disk_says_so_in_a_line_and_exits_with_1(
    quick: Any, disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.fill()
    for words in (["distill", "ring", "--set", f"teacher.path={quick('ring').teacher.path}"], ["pretrain", "ring"]):
        assert command([*words, "--out", str(disk.path / "run")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("raydmd: ") and error.endswith(f"{FULL}\n") and error.count("\n") == 1, error
    assert os.listdir(disk.path) == ["filler"]


def test_a_run_on_a_full_disk_ends_in_a_line_and_goes_on_after_room_is_made(
    quick: Any, disk: SmallDisk, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = disk.path / "run"
    recipe = quick(
        "ring", "iterations=[6, 4]", "checkpoint.every=2", "monitor.samples_every=3", "monitor.tensorboard=true"
    )
    disk.resize(160)
    with pytest.raises(StorageError, match=rf": {FULL}$"):
        distill(recipe, folder, console=QUIET)
    assert "Traceback" not in "".join(capfd.readouterr())  # TensorBoard's thread has nothing to say
    assert half_written(folder) == [] and not list(folder.rglob("run.lock"))
    assert read_lines(folder / "events.jsonl")[0]["event"] == "started"
    disk.resize(16384)
    assert distill(recipe, folder, console=QUIET) is True
    assert [line["iteration"] for line in read_lines(folder / "metrics.jsonl")] == list(range(10))
    assert half_written(folder) == [] and expert_file(folder, 1).is_file()


def when(folder: Path, iterations: int, act: Callable[[], Any]) -> threading.Thread:
    """Do something to a run, in a thread, once it has made so many iterations."""

    def wait() -> None:
        wait_until(lambda: len(read_lines(folder / "metrics.jsonl")) >= iterations)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    with head_alone(4):
        yield


def test_a_run_whose_storage_goes_away_ends_in_a_line_and_goes_on_once_it_is_back(
    here: None, quick: Any, disk: SmallDisk, tmp_path: Path
) -> None:
    """The disk of its checkpoints turns read-only amid the run, as kernels make those that fail."""
    disk.resize(16384)
    folder, store = tmp_path / "run", disk.path / "store"
    recipe = quick("ring", "iterations=[6, 5000]", "checkpoint.every=2", f"checkpoint.path={store}")

    def lose() -> None:
        while True:  # as soon as no file there is being written
            try:
                return disk.protect(writable=False)
            except subprocess.CalledProcessError:
                pass

    thread = when(folder, 5, lose)
    message = r"^checkpoint\.path: .*Read-only file system; the same command goes on when its storage is back$"
    with pytest.raises(StorageError, match=message):
        distill(recipe, folder, console=QUIET)
    thread.join(60)
    disk.protect(writable=True)
    kept = Archive(str(store)).newest().manifest
    assert kept is not None
    assert distill(recipe, folder, console=QUIET, until=kept.iteration + 3) is False
    assert [line["iteration"] for line in read_lines(folder / "metrics.jsonl")] == list(range(kept.iteration + 3))
    assert half_written(store) == []


def test_checkpoints_that_are_removed_in_a_run(here: None, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """The next one is whole: the run that goes on from it has the first phase's expert, and the same bits."""
    folder = tmp_path / "run"
    recipe = quick("ring", "iterations=[4, 8]", "checkpoint.every=2")
    thread = when(folder, 6, lambda: shutil.rmtree(folder / "checkpoints"))
    distill(recipe, folder, console=QUIET, until=10)
    thread.join(60)
    newest = Archive(str(folder / "checkpoints")).newest()
    assert newest.manifest is not None and newest.manifest.iteration == 10 and not newest.skipped
    assert distill(recipe, folder, console=QUIET) is True
    family = recipe_family(recipe)
    whole = train(recipe, family, family.load_teacher(), prompts("ring"))
    for phase, weights in enumerate(whole.experts):
        assert same(load_file(expert_file(folder, phase)), {name: value.numpy() for name, value in weights.items()})


# --- the embedded teacher's training


def checkpoint(folder: Path, name: str, iteration: int, whole: bool = True) -> None:
    place = folder / name
    place.mkdir(parents=True)
    (place / "state.safetensors").write_bytes(b"state %d" % iteration)
    digest = hashlib.sha256(b"state %d" % iteration).hexdigest()
    (place / "state.json").write_text(json.dumps({"iteration": iteration, "sha256": digest if whole else "0"}))


def test_a_training_that_was_cut_short_goes_on_from_its_newest_whole_state(tmp_path: Path) -> None:
    assert salvage(tmp_path) == 0 and os.listdir(tmp_path) == []
    checkpoint(tmp_path, "train/checkpoint_1", 100)
    checkpoint(tmp_path, "train/checkpoint_2", 200)
    checkpoint(tmp_path, "train/checkpoint_3", 300, whole=False)
    (tmp_path / "train/checkpoint_4").mkdir()
    (tmp_path / "train/checkpoint_manager_snapshot.json").write_text("{")  # Ray Train starts with no half of it
    assert salvage(tmp_path) == salvage(tmp_path) == 200
    assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept/state.safetensors").read_bytes() == b"state 200"
    checkpoint(tmp_path, "train/checkpoint_5", 250)
    assert salvage(tmp_path) == 250
    (tmp_path / "kept/state.safetensors").write_bytes(b"")
    assert salvage(tmp_path) == 0 and os.listdir(tmp_path) == []
