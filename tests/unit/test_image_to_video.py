"""A run on captioned pictures: the first frame of a prompt of one's own, and what is said where none can be had."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_folders import make_run

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.cli import run as command
from raydmd.data.encoded_table import EncodedTable
from raydmd.data.prompts import PromptTable
from raydmd.evaluation.validation_prompts import check_validation_prompts, preview_words
from raydmd.methods.loading import parse_recipe
from raydmd.models.encoding import encoded_facts, texts_for
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.models.tiny.wan import WIDTH
from raydmd.recipe_check import check, check_encoded
from raydmd.runs.run import recipe_family
from raydmd.runtime.encode import FILE, NUMBER, PLACES, TEXTS, PromptEncoder

CAPTIONS = ["a red fox", "a fox in snow", "two foxes"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(3):
        pixels = draw.integers(0, 256, (70, 50 + 9 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encode the folder, and train on it, in this process."""
    root, tiny = tmp_path_factory.mktemp("run"), TINY_MODELS["wan_i2v"]
    teacher = tiny.save(root / "wan")
    put_text_encoder("wan", WIDTH, teacher)
    index = teacher / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "WanImageToVideoPipeline"}))
    recipe = parse_recipe(
        {
            "name": "x", "iterations": 2, "batch": {"size": 1}, "prompts": {"path": str(pictures)},
            "teacher": {"family": "wan", "path": str(teacher), "options": dict(tiny.options), "guidance_scale": 2},
            "method": {"name": "phased", "fake_updates": 1, "experts": {"kind": "lora", "rank": 2}},
            "monitor": {"prompts": ["two foxes", 1]}, "runtime": {"encoder": {"batch": 2}},
        },
        "x",
    )  # fmt: skip
    family = recipe_family(recipe)
    check(recipe)
    check_validation_prompts(recipe, family)
    texts = texts_for(family, str(pictures))
    assert texts is not None
    facts = encoded_facts(family, texts, 2)
    table, worker = EncodedTable(str(root / "table"), facts, "--out"), PromptEncoder(recipe, facts, str(pictures))
    table.claim()
    for number in range(table.files):
        rows = range(*table.span(number))
        work = [json.dumps([texts.texts[row] for row in rows]), json.dumps([texts.where(row) for row in rows])]
        item = {NUMBER: np.array([number]), TEXTS: np.array(work[:1]), PLACES: np.array(work[1:])}
        table.commit(number, bytes(worker(item)[FILE][0]))
    encoded = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"path": table.place})})
    check_encoded(encoded)
    assert preview_words(encoded, family, 3) == ["two foxes", "row 1", "two foxes"]
    return make_run(encoded, root / "run", PromptTable(table.place, family.condition_columns)).folder


def generated(run: Path, out: Path, *words: Any) -> dict[str, bytes]:
    assert command(["generate", str(run), "--out", str(out), *map(str, words)]) == 0
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_first_frame_is_a_caption_or_a_picture(run: Path, pictures: Path, tmp_path: Path, capfd: Any) -> None:
    """A row of the run's and its own text and picture make the same bytes; another picture makes others."""
    name = "two-foxes-0-0.mp4"
    by_text = generated(run, tmp_path / "a", "--prompt", "two foxes")[name]
    by_picture = generated(run, tmp_path / "b", "--prompt", "two foxes", "--image", pictures / "2.png")[name]
    other = generated(run, tmp_path / "c", "--prompt", "two foxes", "--image", pictures / "1.png")[name]
    assert by_text == by_picture != other
    capfd.readouterr()
    own = generated(run, tmp_path / "d", "--prompt", "a wolf", "--image", pictures / "2.png")
    assert len(own) == 1 and by_picture not in own.values()
    out, err = capfd.readouterr()
    assert [Path(line).name for line in out.splitlines()] == [*own] and not err  # nothing of a library's


@pytest.mark.parametrize(
    ("prompt", "image", "words"),
    [
        ("two fixes", None, "did you mean 'two foxes'?; a prompt of your own comes with a first frame: --image FILE"),
        ("a wolf", "none.png", "none.png: it cannot be read as a picture: No such file or directory"),
        ("a wolf", "metadata.jsonl", "metadata.jsonl: it cannot be read as a picture: cannot identify image file"),
    ],
)
def test_what_is_no_first_frame_is_a_line(
    run: Path, pictures: Path, tmp_path: Path, capsys: Any, prompt: str, image: str | None, words: str
) -> None:
    given = [] if image is None else ["--image", str(pictures / image)]
    assert command(["generate", str(run), "--prompt", prompt, *given, "--out", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert words in said and not (tmp_path / "out").exists()


def test_models_of_text_take_no_first_frame(
    quick: Any, prompts: Any, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = make_run(quick("ring"), tmp_path / "ring", prompts("ring")).folder
    assert command(["generate", str(folder), "--prompt", "x", "--image", str(pictures / "0.png")]) == 2
    assert "family 'ring' takes no first frame here; leave it out" in capsys.readouterr().err
