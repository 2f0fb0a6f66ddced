"""Manifests: a process killed at any moment of a save leaves a whole checkpoint, and broken ones are passed over."""

import hashlib
import json
import os
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mortal import Save, SaveExpert, careless, dying_here, expert, is_of, killed_at, manifest, same, shards

from raydmd.errors import RunError, UserError
from raydmd.runtime.checkpoint.manager import Archive, Found, Writer
from raydmd.runtime.checkpoint.manifest import sealed
from raydmd.runtime.checkpoint.shards import CODES, PIECE, pieces


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
    assert found.manifest is not None and found.manifest.iteration == 12 and found.shards == {}


def test_the_newest_is_so_by_number_and_not_by_name(tmp_path: Path) -> None:
    archive = saved(tmp_path, 999_999, 1_000_000)
    assert is_of(archive.newest(), 1_000_000)
    assert contents(tmp_path) == sorted(files_of(999_999, 1_000_000))


def test_nothing_there(tmp_path: Path) -> None:
    assert Archive(str(tmp_path / "never")).newest() == Found(None, {}, [])
    (tmp_path / "step-000003.json.part").write_text("{")
    (tmp_path / "other.json").write_text("{")
    archive = Archive(str(tmp_path))
    assert archive.newest() == Found(None, {}, []) and archive.peek() is None


def test_a_folder_shared_with_other_files_keeps_them(tmp_path: Path) -> None:
    for name in ("data/x", "step-1/x", "stepping/x", "other.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    saved(tmp_path, 2, 4, 6, keep=1)
    assert contents(tmp_path) == sorted([*files_of(6), "data/x", "step-1/x", "stepping/x", "other.json"])


def test_a_file_uri(tmp_path: Path) -> None:
    Archive(f"file://{tmp_path}/the%20run").save(manifest(3), shards(3))
    assert is_of(Archive(str(tmp_path / "the run")).newest(), 3)


def test_small_texts(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path / "new"))
    assert archive.read_text("recipe.yaml") is None
    for text in ("name: é\n", ""):
        archive.write_text("recipe.yaml", text)
        assert Archive(str(tmp_path / "new")).read_text("recipe.yaml") == text
    assert contents(tmp_path) == ["new/recipe.yaml"]
    with pytest.raises(UserError, match=r"^checkpoint\.path: .*file.* cannot be written: "):
        (tmp_path / "file").write_text("")
        Archive(str(tmp_path / "file")).write_text("recipe.yaml", "")


# --- shards


def test_a_shard_is_what_the_library_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"é {code}": (rng.random((3, 5)) * 9).astype(np.dtype(kind)) for kind, code in CODES.items()}
    tensors |= {"scalar": np.array(7), "empty": np.zeros((0, 3)), "turned": np.arange(6).reshape(2, 3).T}
    tensors |= {"big endian": np.arange(4).astype(">f4"), "long": rng.standard_normal(PIECE // 4).astype("f4")}
    written = list(pieces(tensors))
    assert max(len(piece) for piece in written) <= PIECE < sum(len(piece) for piece in written)
    (tmp_path / "x").write_bytes(b"".join(written))
    for found in (safetensors.numpy.load_file(tmp_path / "x"), safetensors.numpy.load(b"".join(written))):
        assert same(found, {name: value.astype(value.dtype.newbyteorder("<")) for name, value in tensors.items()})
    with pytest.raises(TypeError, match="^words: .*"):
        list(pieces({"words": np.array(["a"])}))
    with pytest.raises(TypeError, match="^things: .*object"):
        list(pieces({"things": np.array([object()])}))


# --- what is broken


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def edit(**changes: Any) -> Any:
    def apply(path: Path) -> None:
        tree = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps(sealed({key: value for key, value in tree.items() if value != "gone"})))

    return apply


def unsealed(**changes: Any) -> Any:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def record_of(name: str, **changes: Any) -> Any:
    def apply(path: Path) -> None:
        tree = json.loads(path.read_text())
        tree["files"][name] = {**tree["files"].get(name, {}), **changes}
        path.write_text(json.dumps(sealed(tree)))

    return apply


STEP = "step-000006.json"
BREAKS = {
    "a bit of a shard": ("step-000006/fake.safetensors", flip, "checksum differs"),
    "half a shard": ("step-000006/fake.safetensors", lambda p: p.write_bytes(p.read_bytes()[:900]), "900 bytes"),
    "a shard gone": ("step-000006/generator.safetensors", Path.unlink, "generator.safetensors"),
    "a folder for a shard": ("step-000006/fake.safetensors", lambda p: p.unlink() or p.mkdir(), "fake.safetensors"),
    "a shard that never was": (STEP, record_of("more", path="step-000006/more", sha256="", bytes=1), "more"),
    "half a manifest": (STEP, lambda p: p.write_text(p.read_text()[:100]), "Unterminated|Expecting"),
    "an empty manifest": (STEP, lambda p: p.write_text(""), "Expecting value"),
    "bytes for a manifest": (STEP, lambda p: p.write_bytes(b"\xff\x00\xfe"), "decode"),
    "no format": (STEP, edit(format="gone"), "format None, 4 expected"),
    "a format that is none": (STEP, edit(format="3"), "format 3, 4 expected"),
    "a checksum gone": (STEP, unsealed(sha256=""), "its checksum differs"),
    "a number that is another": (STEP, unsealed(cursors={"fake": 479}), "its checksum differs"),
    "a shard's checksum that is another": (STEP, unsealed(files={}), "its checksum differs"),
    "a field too many": (STEP, edit(colour="red"), "colour"),
    "a field gone": (STEP, edit(cursors="gone"), "cursors"),
    "a number that is none": (STEP, edit(cursors={"fake": "12"}), "cursors is {'fake': '12'}"),
    "a number below zero": (STEP, edit(phase=-1), "phase is -1"),
    "another step's": (STEP, edit(iteration=5), "it is of iteration 5"),
    "a list": (STEP, lambda p: p.write_text("[1]"), "not a record"),
    "a list for files": (STEP, edit(files=[]), "files"),
    "an expert that is not named": (STEP, edit(experts=1), "it names no expert-0"),
    "a path that leads out": (STEP, record_of("fake", path="../step-000006/fake.safetensors"), "leads out"),
    "an absolute path": (STEP, record_of("fake", path="/etc/passwd"), "leads out"),
    "a record that is none": (STEP, edit(files={"fake": "x"}), "string"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_one_is_passed_over_and_said(what: str, tmp_path: Path) -> None:
    archive = saved(tmp_path, 4, 6)
    whole = archive.newest()
    assert is_of(whole, 6) and not whole.skipped
    name, damage, why = BREAKS[what]
    damage(tmp_path / name)
    found = archive.newest()
    assert is_of(found, 4)
    (line,) = found.skipped
    start = f"checkpoint {tmp_path}/step-000006.json is not whole and is skipped: "
    assert line.startswith(start) and "\n" not in line
    assert re.search(why, line.removeprefix(start)), line
    (tmp_path / "step-000004.json").write_text("{}")
    found = archive.newest()
    assert found.manifest is None and found.shards == {} and len(found.skipped) == 2


def test_a_pickle_in_place_of_a_shard_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    archive, content = saved(tmp_path, 4, 6), pickle.dumps(Evil())
    (tmp_path / "step-000006/fake.safetensors").write_bytes(content)
    record_of("fake", sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))(tmp_path / STEP)
    found = archive.newest()
    assert is_of(found, 4) and "header" in found.skipped[0].lower()
    assert not (tmp_path / "executed").exists()
    pickle.loads(content)
    assert (tmp_path / "executed").exists()


def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path: Path) -> None:
    archive = saved(tmp_path / "run", 4)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").symlink_to("run")  # a loop: no permission stops root
    for look in (archive.newest, archive.peek):
        with pytest.raises(UserError, match=rf"^checkpoint\.path: {tmp_path}/run cannot be read: .*"):
            look()


def test_an_unreadable_disk_block_is_a_broken_file_and_a_dead_network_is_not(tmp_path: Path) -> None:
    store = saved(tmp_path, 4).store
    assert store.lost(OSError(5, "EIO")) and store.lost(FileNotFoundError(2, "gone")) and store.lost(ValueError())
    assert not store.lost(PermissionError(13, "no")) and not store.lost(OSError(110, "timed out"))


def test_peek_reads_no_shard(tmp_path: Path) -> None:
    archive = saved(tmp_path, 4, 6)

    def peeked() -> int | None:
        found = archive.peek()
        return found and found.iteration

    assert archive.peek() == archive.newest().manifest
    flip(tmp_path / "step-000006/fake.safetensors")
    assert peeked() == 6  # what only newest sees
    BREAKS["half a shard"][1](tmp_path / "step-000006/fake.safetensors")
    assert peeked() == 4
    (tmp_path / "step-000004/fake.safetensors").unlink()
    assert peeked() is None
    archive.save(manifest(7), {})
    assert peeked() == 7
    (tmp_path / "step-000007.json").write_text("{")
    assert peeked() is None


def test_a_broken_one_never_outlives_what_is_saved_after_it(tmp_path: Path) -> None:
    """The run goes on from 4 because 6 is broken: what it saves at 5 must be kept, even with room for one."""
    saved(tmp_path, 4, 6)
    flip(tmp_path / "step-000006/fake.safetensors")
    archive = Archive(str(tmp_path), keep=1)
    assert is_of(archive.newest(), 4)
    archive.save(manifest(5), shards(5))
    assert is_of(archive.newest(), 5) and contents(tmp_path) == files_of(5)


# --- finished experts


def test_every_later_manifest_names_a_finished_expert_and_pruning_leaves_it(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path), keep=1)
    SaveExpert(0, 7)(archive)
    for step in (Save(4, (7,), edge=True), Save(6, (7,)), Save(8, (7,))):
        step(archive)
        assert step.is_there(archive.newest())
    SaveExpert(1, 9)(Archive(str(tmp_path)))
    Save(9, (7, 9), edge=True)(Archive(str(tmp_path), keep=1))  # by processes that know nothing of one another
    found = Archive(str(tmp_path)).newest()
    assert is_of(found, 9, (7, 9), edge=True) and not found.skipped
    flip(tmp_path / found.manifest.files["expert-0"]["path"])
    found = archive.newest()
    assert found.manifest is None and "experts/phase-1-" in found.skipped[0]


def test_an_expert_that_was_never_saved(tmp_path: Path) -> None:
    archive = saved(tmp_path, 2)
    with pytest.raises(RunError, match=r"^checkpoint\.path: .* holds no expert of phase 1: "):
        Save(4, (7,))(archive)
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts/phase-1.json").write_text("{}")
    with pytest.raises(RunError, match="holds no expert of phase 1"):
        Save(4, (7,))(archive)
    assert is_of(archive.newest(), 2)


def test_an_expert_written_again_after_going_back_spoils_no_older_manifest(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    for step in (SaveExpert(0, 7), Save(4, (7,), edge=True), Save(6, (7,)), SaveExpert(0, 8)):
        step(archive)
    assert is_of(Archive(str(tmp_path)).newest(), 6, (7,))
    # a process that goes on from 6 is built on the expert that 6 names, whatever was finished later elsewhere
    Save(8, (7,))(Archive(str(tmp_path)))
    assert is_of(archive.newest(), 8, (7,))
    resumed = Archive(str(tmp_path))
    resumed.newest()
    Save(10, (7,))(resumed)
    assert is_of(archive.newest(), 10, (7,))
    # one that went back and finished the phase anew is built on the new one, though older manifests lie there
    for step in (SaveExpert(0, 8), Save(4, (8,), edge=True)):
        step(Archive(str(tmp_path), writer=Writer("another start", archive.writers())))
    assert is_of(archive.newest(), 4, (8,), edge=True)


def test_a_damaged_expert_is_mended_when_it_is_saved_again(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    for step in (SaveExpert(0, 7), Save(4, (7,))):
        step(archive)
    (path,) = (tmp_path / "experts").glob("*.safetensors")
    flip(path)
    assert archive.newest().manifest is None
    archive.save_expert(0, expert(7))
    assert is_of(archive.newest(), 4, (7,))


# --- death


REPEATED = Save(8, (7,))
STORY = [
    Save(2), Save(4), SaveExpert(0, 7), Save(6, (7,), edge=True), REPEATED, Save(8, (7,)),
    SaveExpert(0, 8), Save(6, (8,), edge=True), Save(8, (8,)), Save(10, (8,)),
]  # fmt: skip


def test_a_kill_at_any_operation_leaves_the_last_whole_checkpoint_or_the_one_before(tmp_path: Path) -> None:
    """Saves, a finished expert, a save that is repeated, and a second course of events after going back."""
    stages, last = [], 0
    while True:
        last += 1
        folder, log = tmp_path / str(last), tmp_path / f"{last}.log"
        died, done = killed_at(partial(dying_here, str(folder)), STORY, last, log)
        if not died:
            break
        before = next((step for step in reversed(STORY[:done]) if isinstance(step, Save)), None)
        under_way = STORY[done]
        fresh = Archive(str(folder))
        found = fresh.newest()
        if before is None and found.manifest is None:
            stages.append((done, False))
        else:
            whole = [step for step in (before, under_way) if isinstance(step, Save) and comes_to(step, found)]
            assert whole, (last, done, found.manifest, found.skipped)
            stages.append((done, whole[-1] is under_way))
        assert not found.skipped
        for step in (SaveExpert(0, 9), Save(12, (9,)), Save(14, (9,))):
            step(fresh)
        assert is_of(Archive(str(folder)).newest(), 14, (9,))
        assert {name for name in contents(folder) if name.startswith("step")} == set(files_of(12, 14))
        assert not [name for name in contents(folder) if name.endswith(".part")]
    assert stages == sorted(stages) and {done for done, _ in stages} == set(range(len(STORY)))
    saves = {(n, late) for n, step in enumerate(STORY) if isinstance(step, Save) for late in (False, True)}
    assert saves - set(stages) == {(STORY.index(REPEATED) + 1, False)}  # a repeated save changes nothing
    print(last - 1, "kills")


def comes_to(step: Save, found: Found) -> bool:
    try:
        return step.is_there(found)
    except AssertionError:
        return False


def test_an_archive_that_writes_over_its_last_checkpoint_does_lose_it(tmp_path: Path) -> None:
    saved(tmp_path / "run", 4)
    died, done = killed_at(partial(careless, str(tmp_path / "run")), [Save(6)], 2, tmp_path / "log")
    assert died and not done  # half of its first shard is written
    assert Archive(str(tmp_path / "run")).newest().manifest is None
