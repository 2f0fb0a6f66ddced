"""What a manifest must say to be a run's: of its plan, of this version; what is another's is skipped or refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mortal import Save, SaveExpert, expert, is_of, manifest
from rich.console import Console

from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.program import trace_method
from raydmd.runs.folders import expert_file
from raydmd.runtime.checkpoint.manager import Archive, Found
from raydmd.runtime.checkpoint.manifest import Manifest, read_sealed, sealed
from raydmd.runtime.checkpoint.plan import run_plan
from raydmd.runtime.checkpoint.writer import CheckpointWriter
from raydmd.runtime.launch import distill
from raydmd.runtime.preparation import has_experts, prepare

SETTINGS = ["iterations=[6, 4]", "method.fake_updates=5", "batch.size=16", "batch.micro=null", "seed=3"]
RECIPE = load_recipe("ring", SETTINGS)
PLAN = run_plan(RECIPE, trace_method(RECIPE))
SHARD = {"path": "x", "sha256": "", "bytes": 0}
RIGHT = manifest(4, files={"generator": SHARD, "fake": SHARD})
EDGE = manifest(6, phase=1, experts=1, files={"expert-0": SHARD})
LAST = manifest(10, phase=2, experts=2, files={"expert-0": SHARD, "expert-1": SHARD})
WRONG: dict[str, tuple[Manifest, dict[str, Any], str]] = {
    "another seed": (RIGHT, {"seed": 4}, "seed is 4, 3 in the run's plan"),
    "another batch": (RIGHT, {"cursors": {"fake": 320, "generator": 32}}, "'generator': 32}, .*64} in the run's plan"),
    "another place in the prompts": (RIGHT, {"cursors": {"fake": 319, "generator": 64}}, "'fake': 319, .*'fake': 320"),
    "a phase ahead": (RIGHT, {"phase": 1}, "phase is 1, 0"),
    "an expert too many": (RIGHT, {"experts": 1}, "experts is 1, 0"),
    "a generator behind": (RIGHT, {"updates": {"generator": 3, "fake": 20}}, "the generator's updates are 3, 4"),
    "a fake behind": (RIGHT, {"updates": {"generator": 4, "fake": 19}}, "the fake's updates are 19, 20"),
    "a fake of another phase": (RIGHT, {"updates": {"generator": 4, "fake": 31}}, "the fake's updates are 31, 20"),
    "a role too many": (RIGHT, {"updates": {**RIGHT.updates, "critic": 1}}, r"its roles are \['critic', 'fake'"),
    "no fake": (RIGHT, {"files": {"generator": SHARD}}, r"lack \['fake'\]"),
    "an edge that lacks its expert": (EDGE, {"files": {}}, r"lack \['expert-0'\]"),
    "an edge before its phase": (EDGE, {"phase": 0, "experts": 0, "files": {}}, "phase is 0, 1"),
    "an edge with what is trained": (EDGE, {"files": {**EDGE.files, "fake": SHARD}}, r"have \['fake'\] besides"),
    "beyond the end": (LAST, {"iteration": 11}, "it is of iteration 11, and the run has 10"),
}  # fmt: skip


def test_a_runs_own_manifests_agree_with_its_plan() -> None:
    for right in (
        RIGHT,
        EDGE,
        LAST,
        replace(RIGHT, updates={"generator": 4, "fake": 25}),
        manifest(0, files=RIGHT.files),
    ):
        PLAN.check(right)


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_says_otherwise_is_not_the_runs(what: str) -> None:
    right, changes, why = WRONG[what]
    with pytest.raises(ValueError, match=why):
        PLAN.check(replace(right, **changes))


def test_an_archive_passes_over_what_is_of_another_plan(tmp_path: Path) -> None:
    for step in (Save(2), Save(4)):
        step(Archive(str(tmp_path)))
    plan = replace(PLAN, ends=(3, 10))
    for archive in (Archive(str(tmp_path), plan=PLAN), Archive(str(tmp_path))):
        assert is_of(archive.newest(), 4) and archive.peek() == archive.newest().manifest
    found = Archive(str(tmp_path), plan=plan).newest()
    assert is_of(found, 2) and "step-000004.json is not whole and is skipped: phase is 0, 1 in" in found.skipped[0]
    assert Archive(str(tmp_path), plan=plan).peek() == found.manifest
    found = Archive(str(tmp_path), plan=replace(PLAN, recipe=RECIPE.model_copy(update={"seed": 0}))).newest()
    assert found.manifest is None and len(found.skipped) == 2


def test_a_recipes_plan(quick: Any) -> None:
    recipe = quick("ring", "iterations=[5, 4]", "seed=7")
    plan = run_plan(recipe, trace_method(recipe))
    assert (plan.ends, plan.draws, plan.student) == ((5, 9), {"fake": 2, "generator": 1}, "generator")
    assert plan.cursors(3) == {"fake": 96, "generator": 48}
    long = quick("ring", "iterations=[6, 1000000]")  # an actor that is restarted is given it again
    assert len(pickle.dumps(run_plan(long, trace_method(long)))) < 10_000


# --- versions and checksums


def rewrite(path: Path, **changes: Any) -> None:
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value != "gone"}))


def test_every_bit_of_a_manifest_is_under_its_checksum(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path))
    Save(4)(archive)
    Save(6)(archive)
    path = tmp_path / "step-000006.json"
    content = path.read_bytes()
    whole = read_sealed(content)
    seen = 0
    for at in range(len(content)):
        broken = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        try:
            assert read_sealed(broken) == whole  # white space, which means nothing
        except ValueError:
            seen += 1
    assert seen > len(content) / 2
    rewrite(path, cursors={})
    assert is_of(archive.newest(), 4)


def test_a_manifest_of_another_version_is_refused_and_never_begun_anew(tmp_path: Path, quick: Any) -> None:
    """Skipping it would train from the start, in its place."""
    prepare(quick("ring"), tmp_path, "auto")
    archive, path = Archive(str(tmp_path / "checkpoints")), tmp_path / "checkpoints/step-000006.json"
    Save(4)(archive)
    Save(6)(archive)
    rewrite(path, format=2, sha256="gone", writer="gone")
    older = rf"^checkpoint\.path: {path} is of an older version \(format 2, 4 here\); go on with that version of raydmd"
    looks = [archive.newest, archive.peek, lambda: prepare(quick("ring"), tmp_path, "auto")]
    for look in looks:
        with pytest.raises(UserError, match=older):
            look()
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "format": 5, "colour": "red"})))
    for look in looks:
        with pytest.raises(UserError, match=r"is of a newer version \(format 5, 4 here\)"):
            look()
    rewrite(path, format=2)  # a checksum, and not this one: broken
    assert is_of(archive.newest(), 4)


def test_a_manifest_of_the_format_before_is_read(tmp_path: Path) -> None:
    """Its roles and streams had keys of their own."""
    archive, path = Archive(str(tmp_path), plan=PLAN), tmp_path / "step-000004.json"
    Save(4)(archive)
    tree = json.loads(path.read_text())
    del tree["updates"], tree["cursors"]
    old = {"generator_version": 4, "fake_version": 20, "generator_cursor": 64, "fake_cursor": 320, "format": 3}
    path.write_text(json.dumps(sealed({**tree, **old})))
    assert is_of(archive.newest(), 4) and archive.peek() == archive.newest().manifest
    path.write_text(json.dumps(sealed({**tree, **old, "fake_version": 19})))
    assert archive.newest().manifest is None
    path.write_text(json.dumps(sealed({**tree, **{key: old[key] for key in old if key != "fake_cursor"}})))
    assert archive.newest().manifest is None


# --- a finished run's experts


def finished(recipe: Any, folder: Path) -> None:
    """Leave what a finished run of one phase leaves."""
    prepare(recipe, folder, "auto")
    writer = CheckpointWriter.__new__(CheckpointWriter)
    writer.folder, writer.archive = folder, Archive(str(folder / "checkpoints"), folder=folder)
    writer.save_expert(0, expert(7))
    last = manifest(
        4, phase=1, experts=1, updates={"generator": 4, "fake": 8}, seed=0, cursors={"generator": 64, "fake": 128}
    )
    writer.archive.save(last, {})


def test_a_finished_runs_experts_are_verified_and_restored(quick: Any, tmp_path: Path) -> None:
    recipe = quick("ring", "method.name=dmd-sgts")
    finished(recipe, tmp_path)
    path, said = expert_file(tmp_path, 0), list[str]()
    content = path.read_bytes()
    assert has_experts(recipe, tmp_path, 1, said.append) and said == []
    for broken in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(broken)
        said.clear()
        assert has_experts(recipe, tmp_path, 1, said.append)
        assert path.read_bytes() == content
        assert said == [f"{path} is not what the run wrote: it is restored from {tmp_path}/checkpoints"]
    path.unlink()
    assert distill(recipe, tmp_path, console=Console(quiet=True)) is True and path.read_bytes() == content
    (there,) = (tmp_path / "checkpoints/experts").glob("*.safetensors")
    there.unlink()
    assert has_experts(recipe, tmp_path, 1, said.append)  # the run's own is whole
    path.write_bytes(b"")
    said.clear()
    assert not has_experts(recipe, tmp_path, 1, said.append)  # it is trained again, and not taken for finished
    assert Archive(str(tmp_path / "checkpoints")).newest() != Found(None, {}, [])


def test_nothing_but_whole_experts_of_all_phases_is_a_finished_run(quick: Any, tmp_path: Path) -> None:
    recipe = quick("ring", "method.name=dmd-sgts")
    prepare(recipe, tmp_path, "auto")
    assert not has_experts(recipe, tmp_path, 1)
    finished(recipe, tmp_path)
    assert not has_experts(recipe, tmp_path, 2)
    SaveExpert(1, 9)(Archive(str(tmp_path / "checkpoints")))
    assert not has_experts(recipe, tmp_path, 2)
