"""Newer weights are taken over while requests go on: each picture is made by one revision, and nothing waits."""

import asyncio
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from local_serving import Flaky, expected, newer, pixels, run, serving

from raydmd.errors import UserError
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run
from raydmd.serving import reload as reload_module
from raydmd.serving.contract import GenerationRequest, GenerationResult
from raydmd.serving.local import local_pipeline
from raydmd.serving.pipeline import Pipeline, stages_of
from raydmd.serving.reload import follow
from raydmd.serving.stage import Engine, NoRevision, Stage, StageBatch


@pytest.fixture
def folder(served_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(served_runs["full"], tmp_path / "run"))


def test_what_a_lost_replica_had_is_made_anew_by_the_same_weights(folder: Path) -> None:
    async def test() -> None:
        settings = serving(folder)
        stage = Stage(settings, stages_of(settings, 2)["experts"])
        flaky = Flaky(stage, 1)
        pipeline = Pipeline(settings, {"experts": flaky})
        newer(folder, 1.1)
        newest = await stage.refresh()
        assert await pipeline.refresh() == newest and len(stage.revisions) == 2
        *steps, right = [
            e async for e in Pipeline(settings, {"experts": stage}).watch(GenerationRequest("2", 2, 5, previews=True))
        ]
        made = await pipeline.make(GenerationRequest("2", 2, 5))
        assert flaky.calls == 2 and made.revision == newest
        assert isinstance(right, GenerationResult) and made.pictures == right.pictures
        flaky.calls = 0
        *again, last = [e async for e in pipeline.watch(GenerationRequest("2", 2, 5, previews=True))]
        assert (
            flaky.calls == 2
            and isinstance(last, GenerationResult)
            and (last.revision, last.pictures) == (newest, made.pictures)
        )
        assert shown(again) == shown(steps)

    run(test)


def shown(steps: list[Any]) -> list[tuple[int, tuple[bytes, ...]]]:
    return [(step.number, step.pictures) for step in steps]


def test_a_stream_that_goes_over_to_other_weights_says_all_steps_anew(folder: Path) -> None:
    async def test() -> None:
        settings = serving(folder)
        stage, behind = (Stage(settings, stages_of(settings, 2)["experts"]) for _ in range(2))
        pipeline = Pipeline(settings, {"experts": behind})
        *old, before = [event async for event in pipeline.watch(GenerationRequest("2", 2, 5, previews=True))]
        pipeline.links = {"experts": Flaky(stage, 1, behind)}
        newer(folder, 1.1)
        assert await stage.refresh() == await pipeline.refresh()
        *steps, made = [event async for event in pipeline.watch(GenerationRequest("2", 2, 5, previews=True))]
        assert isinstance(made, GenerationResult) and isinstance(before, GenerationResult)
        assert (made.revision, made.pictures) == (before.revision, before.pictures)
        assert [number for number, _ in shown(steps)] == [1, 2, 3, 1, 2, 3, 4] and shown(steps)[3:] == shown(old)

    run(test)


def test_newer_weights_are_taken_over_while_requests_go_on(folder: Path) -> None:
    async def test() -> None:
        settings = serving(folder, layout="pipelined", reload_seconds=0.05)
        pipeline = local_pipeline(settings)
        stages: list[Any] = [pipeline.links["expert-1"], pipeline.links["expert-2"]]
        old = await pipeline.make(GenerationRequest("6", 2, 8))
        followers = [asyncio.create_task(follow(settings, old.revision, each.refresh)) for each in (pipeline, *stages)]
        newer(folder, 1.1)
        right = await local_pipeline(settings).make(GenerationRequest("6", 2, 8))
        seen: list[GenerationResult] = []
        while not seen or seen[-1].revision == old.revision:
            seen.append(await pipeline.make(GenerationRequest("6", 2, 8)))
        assert seen[-1].revision == right.revision != old.revision
        by_revision = {each.revision: each.pictures for each in seen}
        assert by_revision.get(old.revision, old.pictures) == old.pictures  # never a mixture of the two
        assert by_revision[right.revision] == right.pictures != old.pictures
        for follower in followers:
            follower.cancel()

    run(test)


def test_what_cannot_be_taken_over_leaves_the_present_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        settings = serving(folder, reload_seconds=0.02)
        pipeline = local_pipeline(settings)
        stage: Any = pipeline.links["experts"]
        old = await pipeline.make(GenerationRequest("6", 2, 8))
        follower = asyncio.create_task(follow(settings, old.revision, stage.refresh))
        expert_file(folder, 1).write_bytes(b"not weights")
        while "not taken over" not in caplog.text:
            await asyncio.sleep(0.01)
        assert stage.revisions == [old.revision]
        assert (await pipeline.make(GenerationRequest("6", 2, 8))).pictures == old.pictures
        with pytest.raises(NoRevision):
            await stage.run(StageBatch("another", "6", 0, 0, 1, (1, 8, 8), None, "png"))
        follower.cancel()

    run(test)


def test_what_could_not_be_taken_over_is_tried_again(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, tries = 0, []
    look = reload_module._revision

    def counted(folder: str, served: str) -> tuple[str | None, str | None]:
        nonlocal looks
        looks += 1
        return look(folder, served)

    monkeypatch.setattr(reload_module, "_revision", counted)

    async def test() -> None:
        settings, done = serving(folder, reload_seconds=0.001), asyncio.Event()
        stage = Stage(settings, ("expert-1",))
        (old,) = stage.revisions

        async def refresh() -> str:
            tries.append(looks)
            if len(tries) < 5:
                raise torch.OutOfMemoryError("no room yet")
            done.set()
            return await stage.refresh()

        newer(folder, 1.1)
        follower = asyncio.create_task(follow(settings, old, refresh))
        await done.wait()
        seen = looks
        while looks < seen + 3:
            await asyncio.sleep(0)
        follower.cancel()
        assert stage.revisions == [old, Run(folder).revision()]

    run(test)
    assert [later - earlier for earlier, later in pairwise(tries)] == [2, 3, 5, 9]
    assert caplog.text.count("no room yet") == 1


def test_the_oldest_weights_make_room_before_the_newest_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        stage, held, load = Stage(serving(folder), ("expert-1",)), [], Engine.__init__

        def loaded(*arguments: Any) -> None:
            held.append(stage.revisions)
            load(*arguments)

        monkeypatch.setattr(Engine, "__init__", loaded)
        revisions = stage.revisions
        for _ in range(3):
            newer(folder, 1.1)
            revisions.append(await stage.refresh())
            await stage.offers(revisions[-1])  # the API serves it
        assert held == [[revision] for revision in revisions[:3]] and stage.revisions == revisions[2:]
        expert_file(folder, 0).write_bytes(b"not weights")
        with pytest.raises(UserError, match="not whole"):
            await stage.refresh()
        assert stage.revisions == revisions[2:]  # the present ones

    run(test)


def test_a_link_may_be_pointed_at_another_run(served_runs: dict[str, Path], tmp_path: Path) -> None:
    async def test() -> None:
        link = tmp_path / "current"
        link.symlink_to(served_runs["full"])
        pipeline = local_pipeline(serving(link))
        old = pipeline.card().revision
        link.unlink()
        link.symlink_to(served_runs["renoise"])
        stage: Any = pipeline.links["experts"]
        assert await stage.refresh() == await pipeline.refresh() != old
        want = expected(served_runs["renoise"], 1, 2, 1)
        assert abs(pixels((await pipeline.make(GenerationRequest("1", 1, 2))).pictures[0]) - want[0]).max() <= 1

    run(test)
