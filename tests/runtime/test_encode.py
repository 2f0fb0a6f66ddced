"""Texts become embeddings on Ray: once, whoever is killed meanwhile; and a run trains on them."""

import io
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
from rich.console import Console
from safetensors.torch import load_file
from test_pairs import meanwhile

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.methods.loading import parse_recipe
from raydmd.methods.local import train
from raydmd.models.tiny.qwen_image import WIDTH, TinyQwenImage
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.runtime.cluster import join_or_start
from raydmd.runtime.encode import encode_file, encode_recipe
from raydmd.runtime.launch import distill

QUIET = Console(quiet=True)
WORKER = "PromptEncoder"  # in the class name of Ray Data's actors
BATCH, TEXTS = 4, [f"a {'very ' * (k % 29)}small fox, number {k}" for k in range(102)]
FILES = 26


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


@pytest.fixture
def recipe(teacher: Path, prompts: Path, tmp_path: Path) -> Recipe:
    cpus = {role: {"cpus": 0.25} for role in ("teacher", "fake", "generator")}
    return parse_recipe(
        {
            "name": "x", "iterations": 1, "batch": {"size": 2},
            "teacher": {"family": "qwen_image", "path": str(teacher), "options": dict(TinyQwenImage.options)},
            "method": {"name": "dmd", "fake_updates": 1, "experts": {"kind": "lora", "rank": 2}},
            "monitor": {"samples_every": 0, "tensorboard": False},
            "prompts": {"path": str(prompts), "cache": str(tmp_path / "cache")},
            "runtime": {**cpus, "encoder": {"cpus": 0.5, "batch": BATCH}},
        },
        "x",
    )  # fmt: skip


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


def test_a_run_encodes_its_texts_once(recipe: Recipe, tmp_path: Path) -> None:
    """The encoder is killed amid the run, which trains on the table; another run finds it and starts none."""
    cache, before = tmp_path / "cache", dict[str, int]()

    def kill() -> None:
        (place,) = wait_until(lambda: [*cache.glob("*")], 120)
        wait_until(lambda: len(stamps(place)) >= 2, 120)
        (encoder,) = [actor for actor in encoders() if actor["State"] == "ALIVE"]
        os.kill(encoder["Pid"], signal.SIGKILL)
        before.update(stamps(place))

    join = meanwhile(kill)
    assert distill(recipe, tmp_path / "one", console=QUIET) is True
    join()
    begun = encoders()
    assert [int(actor["NumRestarts"]) for actor in begun] == [1] and begun[0]["State"] == "DEAD"
    (place,) = cache.iterdir()
    files = stamps(place)
    assert 2 <= len(before) < len(files) == FILES and before.items() <= files.items()
    assert_rows(place, recipe)

    said = io.StringIO()
    other = encode_recipe(recipe, tmp_path / "two", Console(file=said, width=500))  # as a run does before it trains
    assert len(encoders()) == 1 and files == stamps(place)
    assert f"prompts: 0 encoded, {len(TEXTS)} found in {place}" in said.getvalue()
    assert other.prompts.path == str(place) == Run(tmp_path / "one").recipe.prompts.path
    family = recipe_family(other)
    table = PromptTable(place, family.condition_columns)
    (expected,) = train(other, family, family.load_teacher(), table).experts
    found = load_file(expert_file(tmp_path / "one", 0))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


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
