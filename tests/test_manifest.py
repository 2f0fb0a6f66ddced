"""Manifests: a process killed at any moment of a save leaves a whole checkpoint, and broken ones are passed over."""

import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs
from safetensors.numpy import load_file

from raydmd.folders import expert_file
from raydmd.runtime.manifest import Archive, Archivist, Manifest


def manifest(iteration: int, **changes: Any) -> Manifest:
    facts = {"phase": 0, "generator_version": iteration, "fake_version": 5 * iteration, "cursor": 96 * iteration}
    return Manifest(iteration=iteration, seed=3, experts=0, **{**facts, **changes})


def shards(iteration: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(iteration)
    return {
        role: {"weight": rng.standard_normal(3000).astype(np.float32), "version": np.array(iteration)}
        for role in ("generator", "fake")
    }


def is_of(found: tuple[Manifest, dict[str, Any]] | None, iteration: int) -> bool:
    """Whether what ``newest`` returned is all of one iteration's state, to the bit."""
    assert found is not None
    kept, states = found
    expected = shards(iteration)
    assert kept.iteration == iteration and kept.cursor == 96 * iteration and kept.seed == 3
    assert states.keys() == expected.keys() == kept.files.keys()
    for role, tensors in expected.items():
        assert states[role].keys() == tensors.keys()
        assert all(np.array_equal(states[role][name], tensors[name]) for name in tensors)
    return True


def saved(folder: Path, *iterations: int, keep: int = 2) -> Archive:
    archive = Archive(str(folder), keep)
    for iteration in iterations:
        archive.save(manifest(iteration), shards(iteration))
    return archive


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def files_of(*iterations: int) -> list[str]:
    names = []
    for n in iterations:
        names += [f"step-{n:06d}.json", f"step-{n:06d}/generator.safetensors", f"step-{n:06d}/fake.safetensors"]
    return sorted(names)


def test_what_is_saved_comes_back_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    archive = saved(tmp_path, 2, 4, 10, 9)
    assert contents(tmp_path) == files_of(4, 9)  # 9 was saved last: 10 is of a future that was given up
    assert is_of(Archive(str(tmp_path)).newest(), 9)
    assert archive.save(manifest(12), {}).files == {}  # at a phase's edge the experts are the state
    found = archive.newest()
    assert found is not None and found[0].iteration == 12 and found[1] == {}


def test_nothing_there(tmp_path: Path) -> None:
    assert Archive(str(tmp_path / "never")).newest() is None
    (tmp_path / "step-000003.json.part").write_text("{")
    assert Archive(str(tmp_path)).newest() is None


def test_a_uri_and_a_file_system_without_renames(tmp_path: Path) -> None:
    archive = Archive(f"file://{tmp_path}/there")
    archive.save(manifest(3), shards(3))
    assert is_of(Archive(str(tmp_path / "there")).newest(), 3)
    store = Archive("mock:///bucket/run", keep=1)  # in memory, and not local: written as object stores are
    assert not isinstance(store.files, fs.LocalFileSystem)
    for iteration in (3, 5):
        store.files.create_dir(f"{store.root}/step-{iteration:06d}")
        store.save(manifest(iteration), shards(iteration))
    assert is_of(store.newest(), 5)
    left = store.files.get_file_info(fs.FileSelector(store.root, recursive=True))
    assert sorted(f.path.removeprefix(f"{store.root}/") for f in left if f.is_file) == files_of(5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def edit(**changes: Any) -> Any:
    def apply(path: Path) -> None:
        tree = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in {**tree, **changes}.items() if value != "gone"}))

    return apply


BREAKS = {
    "a bit of a shard": ("step-000006/fake.safetensors", flip),
    "half a shard": ("step-000006/fake.safetensors", lambda p: p.write_bytes(p.read_bytes()[:900])),
    "a shard gone": ("step-000006/generator.safetensors", Path.unlink),
    "half a manifest": ("step-000006.json", lambda p: p.write_text(p.read_text()[:100])),
    "an empty manifest": ("step-000006.json", lambda p: p.write_text("")),
    "bytes for a manifest": ("step-000006.json", lambda p: p.write_bytes(b"\xff\x00\xfe")),
    "another format": ("step-000006.json", edit(format=99)),
    "a field too many": ("step-000006.json", edit(colour="red")),
    "a field gone": ("step-000006.json", edit(cursor="gone")),
    "a list": ("step-000006.json", lambda p: p.write_text("[1]")),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_one_is_passed_over_with_a_warning(what: str, tmp_path: Path, caplog: Any) -> None:
    archive = saved(tmp_path, 4, 6)
    assert is_of(archive.newest(), 6) and not caplog.records
    name, damage = BREAKS[what]
    damage(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert is_of(archive.newest(), 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-000006" in caplog.text and "skipped" in caplog.text
    (tmp_path / "step-000004.json").write_text("{}")
    assert archive.newest() is None


def test_a_broken_one_never_outlives_what_is_saved_after_it(tmp_path: Path) -> None:
    """The run goes on from 4 because 6 is broken: what it saves at 5 must be kept, even with room for one."""
    saved(tmp_path, 4, 6)
    flip(tmp_path / "step-000006/fake.safetensors")
    archive = saved(tmp_path, 5, keep=1)
    assert is_of(archive.newest(), 5) and contents(tmp_path) == files_of(5)


class Mortal(fs.LocalFileSystem):
    """The local file system; the process dies by SIGKILL at its ``last`` operation, a write half done."""

    last: int
    done: int = 0

    def tick(self) -> bool:
        self.done += 1
        return self.done == self.last

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _mortal(name: str) -> Any:  # noqa: N805
        def call(self: "Mortal", *args: Any, **kwargs: Any) -> Any:
            if self.tick():
                self.die()
            return getattr(fs.LocalFileSystem, name)(self, *args, **kwargs)

        return call

    create_dir, move = _mortal("create_dir"), _mortal("move")
    delete_file, delete_dir = _mortal("delete_file"), _mortal("delete_dir")

    def open_output_stream(self, *args: Any, **kwargs: Any) -> Any:
        if self.tick():
            self.die()
        return HalfWriter(self, super().open_output_stream(*args, **kwargs))


class HalfWriter:
    def __init__(self, files: Mortal, stream: Any) -> None:
        self.files, self.stream = files, stream

    def __enter__(self) -> "HalfWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()

    def write(self, content: bytes) -> None:
        if self.files.tick():
            self.stream.write(content[: len(content) // 2])
            self.stream.close()
            self.files.die()
        self.stream.write(content)


class InPlace(Archive):
    """The negative control: what an archive without care does, writing one checkpoint over the last."""

    def _write(self, path: str, content: bytes) -> None:
        target = f"{self.root}/{path.replace('step-000006', 'step-000004')}"
        with self.files.open_output_stream(target) as stream:
            stream.write(content)


def save_and_die(kind: type[Archive], folder: str, last: int) -> None:
    archive = kind(folder, keep=2)
    archive.files = Mortal()
    archive.files.last = last
    archive.save(manifest(6), shards(6))
    os._exit(0)


def killed_at(kind: type[Archive], folder: Path, last: int) -> bool:
    """Save iteration 6 in a process that dies at operation ``last``; return whether it came that far."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raydmd.runtime.manifest"])
    process = context.Process(target=save_and_die, args=(kind, str(folder), last))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    found, last = [], 0
    while True:
        last += 1
        folder = tmp_path / str(last)
        archive = saved(folder, 2, 4)
        died = killed_at(Archive, folder, last)
        newest = archive.newest()
        assert newest is not None
        found.append(newest[0].iteration)
        assert is_of(newest, found[-1])
        saved(folder, 6)  # the run goes on and comes here again
        assert is_of(archive.newest(), 6) and contents(folder) == files_of(4, 6)
        if not died:
            break
    assert last > 12 and set(found) == {4, 6} and found == sorted(found)


def test_an_archive_that_writes_over_its_last_checkpoint_does_lose_it(tmp_path: Path, caplog: Any) -> None:
    saved(tmp_path, 4)
    assert killed_at(InPlace, tmp_path, 4)  # half of its first shard is written
    assert Archive(str(tmp_path)).newest() is None


def test_a_finished_expert_is_whole_or_not_there(tmp_path: Path) -> None:
    archivist = Archivist(str(tmp_path), keep=2)
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.zeros(1, np.float32)}  # not contiguous
    archivist.save_expert(1, weights)
    kept = load_file(expert_file(tmp_path, 1))
    assert kept.keys() == weights.keys() and all(np.array_equal(kept[name], weights[name]) for name in weights)
    assert contents(tmp_path) == ["experts/phase-2/model.safetensors"]
    names, states = list(shards(3)), list(shards(3).values())
    assert archivist.save(manifest(3), names, *states).files.keys() == shards(3).keys()
    assert is_of(Archive(str(tmp_path / "checkpoints")).newest(), 3)
