"""Serving in one process: the same pictures however they are made, batches, cancellation, what is refused."""

import asyncio
import io
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_serving import Flaky, expected, pixels, run, serving
from PIL import Image
from run_folders import make_run
from safetensors.torch import load_file

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.models.experts import fuse_lora
from raydmd.runs.run import Run
from raydmd.serving import stage as stage_module
from raydmd.serving.card import read_card
from raydmd.serving.contract import BadRequest, GenerationRequest, GenerationResult, Overloaded, Step, Unavailable
from raydmd.serving.local import local_pipeline
from raydmd.serving.pipeline import TRIES, Pipeline, stages_of
from raydmd.serving.settings import load_serving
from raydmd.serving.stage import Engine, Stage

WAYS = [
    {"layout": "colocated"},
    {"layout": "colocated", "weights": "switched", "encoder": "own", "decoder": "own"},
    {"layout": "pipelined"},
    {"layout": "pipelined", "encoder": "own", "decoder": "own", "max_batch": 2},
]


@pytest.mark.parametrize("name", ["full", "lora", "renoise"])
def test_a_seed_is_a_picture_alone_in_a_batch_and_in_any_layout(served_runs: dict[str, Path], name: str) -> None:
    async def test() -> None:
        want = expected(served_runs[name], 3, 11, 5)
        for way in WAYS:
            pipeline = local_pipeline(serving(served_runs[name], **way))
            others = [pipeline.make(GenerationRequest(str(digit), 2, digit)) for digit in range(6)]
            made, alone, *_ = await asyncio.gather(
                pipeline.make(GenerationRequest("3", 5, 11)), pipeline.make(GenerationRequest("3", 1, 11)), *others
            )
            assert max(made.batches.values()) == (2 if "max_batch" in way else 16), way
            for got, right in zip(made.pictures, want, strict=True):
                assert abs(pixels(got) - right).max() <= 1
            assert abs(pixels(alone.pictures[0]) - want[0]).max() <= 1
            other = await pipeline.make(GenerationRequest("3", 1, 12))
            assert abs(pixels(other.pictures[0]) - want[0]).max() > 20

    run(test)


def test_fused_weights_are_the_adapters(served_runs: dict[str, Path]) -> None:
    opened = Run(served_runs["lora"])
    state, kind = load_file(opened.expert_file(1)), opened.recipe.method.experts
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.3, dtype=torch.float64)
    labels = {"label": torch.arange(4)}
    right = opened.experts(opened.teacher()).expert(1)(x, t, labels)
    fused = fuse_lora(opened.teacher(), state, kind.rank, kind.alpha)(x, t, labels)
    assert (fused - right).abs().max() < 1e-5
    assert (fuse_lora(opened.teacher(), state, kind.rank, 3 * kind.alpha)(x, t, labels) - right).abs().max() > 1e-4
    assert (opened.teacher()(x, t, labels) - right).abs().max() > 1e-4
    with pytest.raises(UserError, match="does not fit"):
        wrong = {"blocks.9.qkv.lora_A.weight": next(iter(state.values()))}
        fuse_lora(opened.teacher(), wrong, kind.rank, kind.alpha)


def test_watching_says_each_step_and_ends_with_the_same(served_runs: dict[str, Path]) -> None:
    async def test() -> None:
        for way in WAYS:
            pipeline = local_pipeline(serving(served_runs["full"], teacher=True, **way))
            *steps, made = [event async for event in pipeline.watch(GenerationRequest("4", 3, 1, previews=True))]
            assert (
                isinstance(made, GenerationResult)
                and made.pictures == (await pipeline.make(GenerationRequest("4", 3, 1))).pictures
            )
            plan = pipeline.card().steps
            assert [(s.number, s.of, s.made_by, s.t, s.t_next) for s in steps if isinstance(s, Step)] == [
                (i, 4, each.made_by, each.t, each.t_next) for i, each in enumerate(plan, start=1)
            ]
            assert [each.made_by for each in plan] == ["expert-1", "expert-1", "expert-2", "expert-2"]
            assert all(isinstance(s, Step) and len(s.pictures) == 3 for s in steps)
            last = steps[-1]  # Euler's last step lands on the prediction itself
            assert isinstance(last, Step)
            assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(last.pictures, made.pictures, strict=True))
        *steps, made = [
            event async for event in pipeline.watch(GenerationRequest("4", 1, 1, "teacher", previews=False))
        ]
        assert [s.made_by for s in steps if isinstance(s, Step)] == ["teacher"] * pipeline.card().teacher_steps
        assert all(isinstance(s, Step) and s.pictures == () for s in steps)

    run(test)


def test_requests_gather_in_batches_while_the_network_works(served_runs: dict[str, Path]) -> None:
    async def test() -> None:
        pipeline = local_pipeline(serving(served_runs["full"], max_batch=8))
        first = asyncio.create_task(pipeline.make(GenerationRequest("1")))
        made = await asyncio.gather(first, *(pipeline.make(GenerationRequest("1", seed=seed)) for seed in range(1, 13)))
        sizes = [each.batches["expert-1"] for each in made]
        assert max(sizes) == 8 and set(sizes) <= {1, 4, 5, 8}
        assert (await pipeline.make(GenerationRequest("1"))).batches["expert-1"] == 1

    run(test)


def held(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let a stage's batches wait until the event is set."""
    gate, do = threading.Event(), stage_module._do

    def wait_and_do(*arguments: Any) -> Any:
        assert gate.wait(60)
        return do(*arguments)

    monkeypatch.setattr(stage_module, "_do", wait_and_do)
    return gate


def test_who_leaves_is_left_out_and_neighbours_do_not_notice(
    served_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        pipeline = local_pipeline(serving(served_runs["full"]))
        stage: Any = pipeline.links["experts"]
        right = (await pipeline.make(GenerationRequest("7", seed=3))).pictures
        gate = held(stage, monkeypatch)
        first = asyncio.create_task(pipeline.make(GenerationRequest("1")))
        while stage._working.done() or stage._queue:
            await asyncio.sleep(0)
        leaver, stayer = (asyncio.create_task(pipeline.make(GenerationRequest("7", n, 3))) for n in (9, 1))
        while len(stage._queue) < 2:
            await asyncio.sleep(0)
        assert pipeline.queued() == 11
        leaver.cancel()
        await asyncio.wait((leaver,))
        assert leaver.cancelled() and pipeline.queued() == 2
        gate.set()
        made = await stayer
        assert made.pictures == right and made.batches["expert-1"] == 1  # and not 10
        await first

    run(test)


def test_a_batch_that_nobody_waits_for_is_not_finished(served_runs: dict[str, Path]) -> None:
    async def test() -> None:
        pipeline = local_pipeline(serving(served_runs["full"], teacher=True, teacher_steps=2000))
        seen = []
        async for event in pipeline.watch(GenerationRequest("7", 1, 3, "teacher")):
            seen.append(event)
            if len(seen) == 3:
                break
        stage: Any = pipeline.links["teacher"]
        working = stage._working
        await asyncio.gather(working, return_exceptions=True)
        assert len(seen) == 3 and pipeline.queued() == 0
        assert (await pipeline.make(GenerationRequest("7"))).pictures

    run(test)


def test_an_error_in_a_batch_is_said_to_its_requests_and_to_no_later_one(
    served_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        pipeline = local_pipeline(serving(served_runs["full"]))
        with monkeypatch.context() as context:
            context.setattr(stage_module, "_do", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await pipeline.make(GenerationRequest("1"))
        assert (await pipeline.make(GenerationRequest("1"))).pictures and pipeline.queued() == 0

    run(test)


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (GenerationRequest("eleven"), "prompt"), (GenerationRequest("11"), "prompt"),
        (GenerationRequest("9" * 5000), "prompt"), (GenerationRequest("\x00"), "prompt"),
        (GenerationRequest("1", size=(9, 9)), "size"), (GenerationRequest("1", maker="teacher"), "model"),
        (GenerationRequest("1", output_format="mp4"), "output_format"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_by_name(
    served_runs: dict[str, Path], ask: GenerationRequest, param: str
) -> None:
    async def test() -> None:
        pipeline = local_pipeline(serving(served_runs["full"]))
        with pytest.raises(BadRequest) as error:
            await pipeline.make(ask)
        assert error.value.param == param and pipeline.queued() == 0
        assert (await pipeline.make(replace(ask, prompt="1", size=None, maker="student", output_format="png"))).pictures

    run(test)


def test_larger_sizes_and_other_formats(served_runs: dict[str, Path]) -> None:
    async def test() -> None:
        pipeline = local_pipeline(serving(served_runs["full"], sizes=[[64, 64]]))
        small, large = [
            (await pipeline.make(GenerationRequest("5", size=size))).pictures[0] for size in ((8, 8), (64, 64))
        ]
        assert (pixels(large)[::8, ::8] == pixels(small)).all() and pixels(large).shape == (64, 64)
        for output_format in ("jpeg", "webp"):
            file = (await pipeline.make(GenerationRequest("5", output_format=output_format))).pictures[0]  # type: ignore[arg-type]
            assert Image.open(io.BytesIO(file)).format == output_format.upper()

    run(test)


def test_what_a_lost_replica_had_is_made_anew(served_runs: dict[str, Path]) -> None:
    async def test() -> None:
        settings = serving(served_runs["full"])
        stage = Stage(settings, stages_of(settings, 2)["experts"])
        right = await Pipeline(settings, {"experts": stage}).make(GenerationRequest("2", 2, 5))
        flaky = Flaky(stage, 2)
        assert (
            await Pipeline(settings, {"experts": flaky}).make(GenerationRequest("2", 2, 5))
        ).pictures == right.pictures
        assert flaky.calls == 3
        flaky = Flaky(stage, 1)
        events = [
            e async for e in Pipeline(settings, {"experts": flaky}).watch(GenerationRequest("2", 2, 5, previews=True))
        ]
        assert [e.number for e in events if isinstance(e, Step)] == [1, 2, 3, 4]  # each of them said once
        assert flaky.calls == 2 and isinstance(events[-1], GenerationResult) and events[-1].pictures == right.pictures
        with pytest.raises(Unavailable):
            await Pipeline(settings, {"experts": Flaky(stage, TRIES)}).make(GenerationRequest("2"))

    run(test)


def test_one_of_several_replicas_does_not_refuse_for_the_others(served_runs: dict[str, Path]) -> None:
    async def test() -> None:
        for replicas in (1, 2):
            settings = serving(served_runs["full"], queue_samples=9, stages={"api": {"max": replicas}})
            pipeline = local_pipeline(settings)
            admission = pipeline.admissions["student"]
            with admission.admitted(1):  # somebody is always inside
                await asyncio.gather(*(pipeline.make(GenerationRequest("1", seed=seed)) for seed in range(8)))
                with admission.admitted(8), pytest.raises(Overloaded) as error:
                    await pipeline.make(GenerationRequest("1"))
            assert (error.value.full_seconds > 0) == (replicas == 1) and error.value.retry_after >= 1

    run(test)


def test_a_card_says_what_is_served(served_runs: dict[str, Path]) -> None:
    card = read_card(serving(served_runs["lora"], teacher=True, sizes=[[16, 16]], name="mine"))
    assert (card.name, card.kind, card.family, card.sizes) == ("mine", "image", "digits", ((8, 8), (16, 16)))
    assert card.prompts == tuple("0123456789") and card.teacher_steps == 25 and card.guidance_scale == 1.5
    assert len(card.steps) == 4 and card.steps[0].t == 1.0 and card.steps[-1].t_next == 0.0


def test_only_the_experts_of_a_stage_are_loaded(served_runs: dict[str, Path]) -> None:
    engine = Engine(serving(served_runs["full"], layout="pipelined"), ("expert-2", "decode"))
    assert list(engine.walks) == ["expert-2"] and engine.encoder is None and engine.decoder is not None
    with pytest.raises(UserError, match="has 2 experts; 3 are served here"):
        Engine(serving(served_runs["full"]), ("expert-3",))


def test_runs_that_cannot_be_served_are_refused(
    served_runs: dict[str, Path], quick: Callable[..., Recipe], prompts: Any, tmp_path: Path
) -> None:
    make_run(quick("ring"), tmp_path / "ring", prompts("ring"))
    with pytest.raises(UserError, match="points in the plane"):
        read_card(serving(tmp_path / "ring"))
    shutil.copytree(served_runs["full"], tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "experts" / "phase-2")
    with pytest.raises(UserError, match="1 of 2 phases"):
        read_card(serving(tmp_path / "half"))
    with pytest.raises(UserError, match="no run in"):
        read_card(serving(tmp_path / "nothing"))
    with pytest.raises(UserError, match="8x8 pixels"):
        read_card(serving(served_runs["full"], sizes=[[12, 12]]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("layuot=pipelined", "did you mean 'layout'"),
        ("layout=both", "layout"),
        ("stages.expert.maks=3", "unknown key 'stages.expert.maks'; did you mean 'max'"),
        ("stages.expert.min=3", "max (1) is below min (3)"),
        ("max_batch=0", "max_batch"),
        ("api=inline", "api: inline goes with layout: colocated, not pipelined"),
    ],
)
def test_wrong_settings_are_named(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_serving("run", "pipelined" if override == "api=inline" else None, False, False, [override])
    assert words in str(error.value) and "\n" not in str(error.value)
