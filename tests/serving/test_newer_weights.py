"""Which newer weights are taken over, and that the last good ones stay whatever comes of the folder."""

import asyncio
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from local_serving import expected, newer, pixels, run, serving
from safetensors.torch import load_file, save_file

from raydmd.config.recipe import dump_recipe
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.runs.expert_index import index_file, read_index, write_index
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run
from raydmd.runtime.checkpoint.writer import CheckpointWriter
from raydmd.serving.card import read_card, read_offer
from raydmd.serving.contract import GenerationRequest
from raydmd.serving.pipeline import Pipeline, stages_of
from raydmd.serving.reload import _revision
from raydmd.serving.stage import Stage


@pytest.fixture
def folder(served_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(served_runs["full"], tmp_path / "run"))


def rewrite(folder: Path, index: int) -> None:
    """Change an expert's last weight, and nothing else."""
    file = expert_file(folder, index)
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", 0.123))


def test_the_api_serves_newer_weights_once_all_stages_hold_them(folder: Path) -> None:
    async def test() -> None:
        settings = serving(folder, layout="pipelined")
        first, second = (Stage(settings, parts) for parts in stages_of(settings, 2).values())
        pipeline = Pipeline(settings, {"expert-1": first, "expert-2": second})
        old = await pipeline.make(GenerationRequest("6", 1, 8))
        newer(folder, 1.1)
        newest = await first.refresh()
        assert newest != old.revision
        assert await pipeline.refresh() == old.revision == pipeline.card().revision
        assert (await pipeline.make(GenerationRequest("6", 1, 8))).pictures == old.pictures
        # weights that come meanwhile do not drive out those that are served
        newer(folder, 1.1)
        newest = await first.refresh()
        assert first.revisions == [old.revision, newest]
        assert (await pipeline.make(GenerationRequest("6", 1, 8))).pictures == old.pictures
        assert await second.refresh() == newest == await pipeline.refresh() == pipeline.card().revision
        made = await pipeline.make(GenerationRequest("6", 1, 8))
        assert made.revision == newest and abs(pixels(made.pictures[0]) - expected(folder, 6, 8, 1)[0]).max() <= 1

    run(test)


def cut(folder: Path) -> None:
    file = expert_file(folder, 1)
    file.write_bytes(file.read_bytes()[:-100])


def not_finite(folder: Path) -> None:
    state = load_file(expert_file(folder, 1))
    name = sorted(state)[0]
    state[name].view(-1)[0] = float("nan")
    save_file(state, expert_file(folder, 1))
    write_index(folder)


def more_experts(folder: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"), ["method.phases=4", "method.steps=4"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    for index in (2, 3):
        expert_file(folder, index).parent.mkdir()
        shutil.copy(expert_file(folder, 1), expert_file(folder, index))
    write_index(folder)


def without_index(folder: Path) -> None:
    rewrite(folder, 1)
    index_file(folder).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "no run"),
        (cut, "not whole"),
        (lambda folder: expert_file(folder, 0).unlink(), "phase-1"),
        (lambda folder: rewrite(folder, 1), "SHA-256"),
        (lambda folder: index_file(folder).write_text("{"), "no index"),
        (lambda folder: (folder / "recipe.yaml").write_text("method: 3"), "recipe.yaml"),
        (not_finite, "not finite"),
        (more_experts, "experts"),
        (without_index, "index.json"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_last_good_weights_stay(folder: Path, change: Callable[[Path], None], words: str) -> None:
    async def test() -> None:
        settings = serving(folder)
        offer = read_offer(settings)
        stage = Stage(settings, stages_of(settings, 2)["experts"])
        pipeline = Pipeline(settings, {"experts": stage})
        old = await pipeline.make(GenerationRequest("6", 1, 8))
        change(folder)
        revision, reason = _revision(str(folder), old.revision)
        if revision is None or revision == old.revision:  # nothing is tried, or nothing seems new
            assert revision == old.revision or words in str(reason)
        if change is not without_index and revision != old.revision:
            with pytest.raises(UserError, match=words):
                await stage.refresh()
        assert await pipeline.refresh() == old.revision
        # another replica of the API starts now: it serves what the stage holds
        again = Pipeline(settings, {"experts": stage}, offer)
        await again.refresh()
        assert again.card() == pipeline.card()
        for each in (pipeline, again):
            made = await each.make(GenerationRequest("6", 1, 8))
            assert (made.revision, made.pictures) == (old.revision, old.pictures)

    run(test)


def test_a_folder_that_is_still_copied_is_not_taken(folder: Path, tmp_path: Path) -> None:
    """As rsync does it: file by file, the index before the experts; sizes are the same all the time."""

    async def test() -> None:
        newer(folder, 1.0)
        longer = Path(shutil.copytree(folder, tmp_path / "longer"))
        newer(longer, 1.1)
        settings = serving(folder)
        stage = Stage(settings, stages_of(settings, 2)["experts"])
        (old,) = stage.revisions
        files = [index_file(longer), *(expert_file(longer, index) for index in (0, 1))]
        for file in files:
            if file != files[0]:
                with pytest.raises(UserError, match="SHA-256"):
                    await stage.refresh()
                assert stage.revisions == [old]
            target = folder / file.relative_to(longer)
            shutil.copy(file, target.with_suffix(".tmp"))
            target.with_suffix(".tmp").replace(target)
        assert await stage.refresh() == Run(longer).revision() != old  # a copy is the same weights

    run(test)


def test_what_is_not_whole_or_not_finite_does_not_start(folder: Path) -> None:
    rewrite(folder, 1)
    with pytest.raises(UserError, match="SHA-256"):
        Stage(serving(folder), ("expert-1", "expert-2"))
    not_finite(folder)
    with pytest.raises(UserError, match="not finite"):
        Stage(serving(folder), ("expert-1", "expert-2"))
    expert_file(folder, 1).write_bytes(b"not weights")
    index_file(folder).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Stage(serving(folder), ("expert-1", "expert-2"))


def test_a_run_of_before_is_served_and_followed_once_it_has_an_index(folder: Path) -> None:
    async def test() -> None:
        index_file(folder).unlink()
        stage = Stage(serving(folder), ("expert-1",))
        (old,) = stage.revisions
        assert _revision(str(folder), old) == (old, None)
        newer(folder, 1.1)
        revision, reason = _revision(str(folder), old)
        assert revision not in (None, old) and reason is None and await stage.refresh() == revision

    run(test)


def test_the_name_is_the_served_path_s(served_runs: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(served_runs["full"])
    assert read_card(serving(link)).name == "current"
    link.unlink()
    link.symlink_to(served_runs["renoise"])
    assert read_card(serving(link)).name == "current"
    assert read_card(serving(link, name="mine")).name == "mine"


def test_a_run_writes_its_index_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr("os.nice", lambda increment: 0)  # this process and its children are not the writer's
    writer = CheckpointWriter(str(tmp_path), str(tmp_path / "checkpoints"), 2)
    for index in (0, 1):
        writer.save_expert(index, {"w": np.full(3, index, dtype=np.float32)})
        entries = read_index(tmp_path)
        assert entries is not None and len(entries) == index + 1
        for name, entry in entries.items():
            assert (tmp_path / name).stat().st_size == entry.bytes
        assert index_file(tmp_path).stat().st_mtime_ns >= expert_file(tmp_path, index).stat().st_mtime_ns
    assert torch.equal(load_file(expert_file(tmp_path, 1))["w"], torch.ones(3))
    assert json.loads(index_file(tmp_path).read_text())["format"] == 1
    assert not list((tmp_path / "experts").glob("*.part"))


def test_stages_are_asked_from_the_start(folder: Path) -> None:
    from raydmd.serving.reload import ask_stages

    async def test() -> None:
        asked = asyncio.Event()

        async def refresh() -> str:
            asked.set()
            return ""

        task = asyncio.create_task(ask_stages(serving(folder, reload_seconds=1000.0), refresh))
        await asked.wait()
        task.cancel()

    run(test)
