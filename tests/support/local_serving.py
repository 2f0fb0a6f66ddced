"""A pipeline in the test's own process, what its pictures are to be, newer weights, a stage whose replicas are lost."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from raydmd.runs.expert_index import write_index
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run
from raydmd.sampling.student import sample_student
from raydmd.serving.card import Offer
from raydmd.serving.pipeline import Lost
from raydmd.serving.settings import Serving, parse_serving
from raydmd.serving.stage import Piece, Stage, StageBatch


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(test(), 300)

    asyncio.run(within())


def serving(folder: Path, **settings: Any) -> Serving:
    return parse_serving({"run": str(folder), **settings}, "test")


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


def expected(folder: Path, digit: int, seed: int, count: int) -> np.ndarray:
    """Return what the run's own sampling makes, [count, 8, 8]."""
    opened = Run(folder)
    conditions = opened.family.conditions({"label": np.full(count, digit)})
    made = sample_student(
        opened.family, opened.experts(opened.teacher()), opened.trained_phases(), conditions, count,
        seed=seed, solver=opened.recipe.method.solver,
    )  # fmt: skip
    return (opened.family.decode(made.latents)[:, 0] * 255).round().numpy().astype(int)


def newer(folder: Path, factor: float) -> None:
    """Change a run's experts in place, as a longer training would."""
    for index in (0, 1):
        state = load_file(expert_file(folder, index))
        part = expert_file(folder, index).with_suffix(".part")
        save_file({name: (value * factor).contiguous() for name, value in state.items()}, part)
        part.replace(expert_file(folder, index))
    write_index(folder)


class Flaky:
    """A stage whose replica is lost on some calls; ``other`` answers the rest, if there is one."""

    def __init__(self, stage: Stage, losses: int, other: Stage | None = None) -> None:
        self.stage, self.losses, self.calls = stage, losses, 0
        self.other = other or stage

    async def run(self, stage_batch: StageBatch) -> Piece:
        self.calls += 1
        if self.calls <= self.losses:
            raise Lost("killed")
        return await self.other.run(stage_batch)

    async def offers(self, served: str) -> list[Offer]:
        return await self.stage.offers(served)

    async def watch(self, stage_batch: StageBatch) -> Any:
        self.calls += 1
        seen = 0
        async for event in (self.stage if self.calls <= self.losses else self.other).watch(stage_batch):
            yield event
            seen += 1
            if self.calls <= self.losses and seen == 3:
                raise Lost("killed")

    async def preview(self, stage_batch: StageBatch) -> tuple[bytes, ...]:
        return await self.stage.preview(stage_batch)
