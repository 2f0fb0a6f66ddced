"""`raydmd serve EXPORT` as users start it: its pictures are the run's, it says what it is, and it is never reloaded."""

import asyncio
import base64
from pathlib import Path

import httpx
import numpy as np
from local_serving import pixels, serving
from run_folders import make_run
from test_every_family import recipe_of
from test_serve import ask, server
from test_use_exports import TEXT, add_text_encoder

from raydmd.data.prompts import PromptTable
from raydmd.export.export import export_run
from raydmd.models.tiny import TINY_MODELS
from raydmd.serving.contract import GenerationRequest
from raydmd.serving.local import local_pipeline


def test_an_export_behind_an_endpoint(tmp_path: Path) -> None:
    tiny, teacher = TINY_MODELS["qwen_image"], tmp_path / "teacher"
    tiny.save(teacher)
    add_text_encoder("qwen_image", teacher)
    recipe = recipe_of(tiny, teacher, "optimizer.generator.lr=0.1", "ema=0", "batch.size=2", "batch.micro=2")
    run = make_run(
        recipe, tmp_path / "run", PromptTable(str(recipe.prompts.path), tiny.build(teacher).condition_columns)
    )
    export_run(run, "lora", tmp_path / "mine", checked=False)
    before = sorted(str(file) for file in (tmp_path / "mine").rglob("*"))
    right = asyncio.run(local_pipeline(serving(run.folder)).make(GenerationRequest(TEXT, 2, 5))).pictures
    with server(tmp_path / "mine", tmp_path / "log", "--fast", XDG_STATE_HOME=str(tmp_path)) as started:
        health = httpx.get(f"{started.url}/health").json()
        assert (health["model"], health["export"]) == ("mine", "lora")
        (model,) = httpx.get(f"{started.url}/v1/models").json()["data"]
        assert (model["id"], model["raydmd"]["export"]) == ("mine", "lora")
        found = [base64.b64decode(each["b64_json"]) for each in ask(started.url, TEXT, 5, 2).json()["data"]]
        for one, other in zip(right, found, strict=True):
            assert np.abs(pixels(one) - pixels(other)).max() <= 1
        assert started.stop() == (0, [])
    assert sorted(str(file) for file in (tmp_path / "mine").rglob("*")) == before
