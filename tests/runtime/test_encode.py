"""Texts become embeddings on Ray, pictures first frames: once, whoever is killed meanwhile; runs train on them."""

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from commands import command as started
from disturbed import wait_until
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_pairs import meanwhile

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.data.pictures import PictureFolder
from raydmd.data.prompts import PromptTable
from raydmd.methods.loading import parse_recipe
from raydmd.methods.local import train
from raydmd.models.base import IMAGE_COLUMN
from raydmd.models.tiny import TINY_MODELS, wan
from raydmd.models.tiny.qwen_image import WIDTH, TinyQwenImage
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.runtime.cluster import join_or_start
from raydmd.runtime.encode import encode_file, encode_recipe
from raydmd.runtime.launch import distill

QUIET = Console(quiet=True)
WORKER = "PromptEncoder"  # in the class name of Ray Data's actors
BATCH, TEXTS = 20, [f"a {'very ' * (k % 29)}small fox, number {k}" for k in range(1000)]
FILES, CAPTIONED = 50, 42  # files of the texts, one a batch; captioned pictures


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    """A Ray of this machine's own."""
    assert join_or_start(3, 100)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = TinyQwenImage().save(tmp_path_factory.mktemp("teacher") / "qwen")
    put_text_encoder("qwen_image", WIDTH, folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


def recipe_of(
    family: str, teacher: Path, options: dict[str, Any], prompts: Path, cache: Path, batch: int = BATCH
) -> Recipe:
    cpus = {role: {"cpus": 0.25} for role in ("teacher", "fake", "generator")}
    return parse_recipe(
        {
            "name": "x", "iterations": 1, "batch": {"size": 2},
            "teacher": {"family": family, "path": str(teacher), "options": dict(options)},
            "method": {"name": "dmd", "fake_updates": 1, "experts": {"kind": "lora", "rank": 2}},
            "monitor": {"samples_every": 0, "tensorboard": False},
            "prompts": {"path": str(prompts), "cache": str(cache)},
            "runtime": {**cpus, "encoder": {"cpus": 0.5, "batch": batch}},
        },
        "x",
    )  # fmt: skip


@pytest.fixture
def recipe(teacher: Path, prompts: Path, tmp_path: Path) -> Recipe:
    return recipe_of("qwen_image", teacher, TinyQwenImage.options, prompts, tmp_path / "cache")


@pytest.fixture
def recipe_of_pictures(tmp_path: Path) -> Recipe:
    """Return that of an image-to-video model, trained on a folder of captioned pictures of several sizes."""
    tiny, pictures = TINY_MODELS["wan_i2v"], tmp_path / "pictures"
    teacher = tiny.save(tmp_path / "wan")
    put_text_encoder("wan", wan.WIDTH, teacher)
    index = teacher / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "WanImageToVideoPipeline"}))
    pictures.mkdir()
    draw, lines = np.random.default_rng(0), []
    for number, text in enumerate(TEXTS[:CAPTIONED]):
        pixels = draw.integers(0, 256, (70, 50 + 9 * (number % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:02}.png")
        lines.append(json.dumps({"file_name": f"{number:02}.png", "caption": text}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return recipe_of("wan", teacher, tiny.options, pictures, tmp_path / "cache", batch=4)


def encoders() -> list[dict[str, Any]]:
    return [actor for actor in ray._private.state.actors().values() if WORKER in actor["ActorClassName"]]


def assert_rows(place: str | Path, recipe: Recipe) -> None:
    """Hold the table against what the family itself encodes, batch by batch."""
    family = recipe_family(recipe)
    table = PromptTable(place, [*family.condition_columns, "prompt"])
    assert len(table) == len(TEXTS)
    for start in range(0, len(TEXTS), 20 * BATCH):
        texts = TEXTS[start : start + BATCH]
        found, expected = table.rows(start, len(texts)), family.encode_prompts(texts)
        assert found["prompt"].tolist() == texts
        for name, values in expected.items():
            length = values.shape[1]
            assert np.allclose(found[name][:, :length], values, atol=1e-5) and not found[name][:, length:].any()
        wrong = family.encode_prompts(texts[::-1])["prompt_embeds"]
        assert not np.allclose(found["prompt_embeds"][:, : wrong.shape[1]], wrong, atol=1e-2)


def stamps(place: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in place.glob("rows-*.parquet")}


def assert_encoded_once(recipe: Recipe, rows: int, folder: Path) -> Path:
    """Kill the encoder amid a run, which trains on the table; another run finds it and starts none; return the table.

    Args:
        recipe: the run's; its cache is ``folder / "cache"``.
        rows: of its prompts.
        folder: for the runs.
    """
    cache, before = folder / "cache", dict[str, int]()
    earlier = {actor["ActorID"] for actor in encoders()}

    def kill() -> None:
        (place,) = wait_until(lambda: [*cache.glob("*")], 120)
        wait_until(lambda: len(stamps(place)) >= 2, 120)
        (encoder,) = [actor for actor in encoders() if actor["State"] == "ALIVE"]
        os.kill(encoder["Pid"], signal.SIGKILL)
        before.update(stamps(place))

    join = meanwhile(kill)
    assert distill(recipe, folder / "one", console=QUIET) is True
    join()
    begun = [actor for actor in encoders() if actor["ActorID"] not in earlier]
    assert [int(actor["NumRestarts"]) for actor in begun] == [1] and begun[0]["State"] == "DEAD"
    (place,) = cache.iterdir()
    files = stamps(place)
    assert 2 <= len(before) < len(files) == -(-rows // recipe.runtime.encoder.batch) and before.items() <= files.items()

    said = io.StringIO()
    other = encode_recipe(recipe, folder / "two", Console(file=said, width=500))  # as a run does before it trains
    assert len(encoders()) == len(earlier) + 1 and files == stamps(place)
    assert f"prompts: 0 encoded, {rows} found in {place}" in said.getvalue()
    assert other.prompts.path == str(place) == Run(folder / "one").recipe.prompts.path
    family = recipe_family(other)
    table = PromptTable(place, family.condition_columns)
    (expected,) = train(other, family, family.load_teacher(), table).experts
    found = load_file(expert_file(folder / "one", 0))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    return place


def test_a_run_encodes_its_texts_once(recipe: Recipe, tmp_path: Path) -> None:
    assert_rows(assert_encoded_once(recipe, len(TEXTS), tmp_path), recipe)


def test_a_run_encodes_its_pictures_once(recipe_of_pictures: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of_pictures
    family = recipe_family(recipe)
    table = PromptTable(assert_encoded_once(recipe, CAPTIONED, tmp_path), [*family.condition_columns, "prompt"])
    assert len(table) == CAPTIONED and IMAGE_COLUMN in family.condition_columns
    width, height = family.picture_size
    pictures = PictureFolder(str(recipe.prompts.path), (3, height, width), [], "prompts.path")
    for start in (0, CAPTIONED - 2):  # of the first file, and of the last
        found, numbers = table.rows(start, 2), np.arange(start, start + 2)
        assert found["prompt"].tolist() == TEXTS[start : start + 2]
        with torch.no_grad():
            first_frames = family.encode_first_frames(pictures.take(numbers)).float().numpy()
        assert np.allclose(found[IMAGE_COLUMN], first_frames, atol=1e-5)
        assert not np.allclose(found[IMAGE_COLUMN], first_frames[::-1], atol=1e-2)


def test_a_driver_is_killed_and_what_it_committed_stays(
    recipe: Recipe, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "table", [f"{key}: {value}" for key, value in TinyQwenImage.options.items()]
    words = ["encode", str(prompts), "--teacher", str(teacher), "--family", "qwen_image", "--out", str(out)]
    words += ["--set", f"teacher.options={{{', '.join(options)}}}", "--set", f"runtime.encoder.batch={BATCH}"]
    with started(words, tmp_path / "log") as driver:
        driver.until(lambda: len(stamps(out)) >= 2)
        os.kill(driver.pid, signal.SIGKILL)
        driver.process.wait(60)
        before = stamps(out)
    assert 2 <= len(before) < FILES
    encoded = encode_file(recipe, str(prompts), str(out), console=QUIET)
    assert (encoded.rows, encoded.made, encoded.cut) == (len(TEXTS), len(TEXTS) - BATCH * len(before), 0)
    assert before.items() <= stamps(out).items()
    assert_rows(out, recipe)
    assert encode_file(recipe, str(prompts), str(out), console=QUIET).made == 0
