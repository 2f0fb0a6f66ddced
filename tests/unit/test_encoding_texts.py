"""What a worker makes of texts and pictures, and what is refused before one is started; without Ray."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.cli import run as command
from raydmd.config.recipe import Recipe
from raydmd.data.encoded_table import EncodedTable
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.methods.loading import parse_recipe
from raydmd.models.diffusers.wan import WanFamily
from raydmd.models.encoding import encoded_facts, texts_for
from raydmd.models.registry import register_family
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.models.tiny.wan import WIDTH, TinyWan
from raydmd.runs.run import note_table, recipe_family, with_table
from raydmd.runtime.encode import CUT, FILE, NUMBER, PLACES, TEXTS, PromptEncoder, check_same_texts
from raydmd.runtime.ray_data import KIND, WORDS

COLOURS = {"a.png": (255, 0, 0), "b.png": (0, 255, 0), "c.png": (0, 0, 255)}


class FirstFrames(WanFamily):
    """Wan from image to video, whose image's latents are the picture's mean colour."""

    name: ClassVar[str] = "first-frames"

    def encode_first_frames(self, pictures: Tensor) -> Tensor:
        height, width = self.picture_size[::-1]
        assert pictures.shape[1:] == (3, height, width)
        frames, *sides = self.latent_shape[1:]
        return pictures.mean((2, 3))[:, :, None, None, None].expand(-1, -1, frames, *sides)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = TinyWan().save(tmp_path_factory.mktemp("teacher"))
    put_text_encoder("wan", WIDTH, folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (30, 20), colour).save(folder / name)
    rows = [{"file_name": name, "caption": f"a picture {name[0]}"} for name in COLOURS]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return folder


def recipe_of(family: str, teacher: Path, **options: Any) -> Recipe:
    tree = {"name": "x", "method": {"name": "phased"}, "runtime": {"encoder": {"batch": 2}}}
    made = {"family": family, "path": str(teacher), "options": {**TinyWan.options, **options}}
    return parse_recipe({**tree, "teacher": made}, "x")


def encoded(recipe: Recipe, path: Path, number: int) -> dict[str, Any]:
    """Have a worker make a file of the table."""
    family, size = recipe_family(recipe), recipe.runtime.encoder.batch
    texts = texts_for(family, str(path))
    assert texts is not None
    rows = range(number * size, min((number + 1) * size, len(texts)))
    worker = PromptEncoder(recipe, encoded_facts(family, texts, size), str(path) if path.is_dir() else None)
    work = [json.dumps([texts.texts[row] for row in rows]), json.dumps([texts.where(row) for row in rows])]
    item = {NUMBER: np.array([number]), TEXTS: np.array(work[:1]), PLACES: np.array(work[1:])}
    return {name: column[0] for name, column in worker(item).items()}


def test_a_row_has_its_own_text_and_picture(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    register_family(FirstFrames)
    recipe = recipe_of("first-frames", teacher, image_channels=3)
    family = recipe_family(recipe)
    for number in (0, 1):
        result = encoded(recipe, pictures, number)
        assert (result[KIND], result[CUT]) == ("", 0), result[WORDS]
        pq.write_table(pq.read_table(pa.BufferReader(result[FILE])), tmp_path / f"{number}.parquet")
        (pictures.parent / "table").mkdir(exist_ok=True)
        (pictures.parent / "table" / f"{number}.parquet").write_bytes(result[FILE])
    table = PromptTable(tmp_path / "table", [*family.condition_columns, "prompt"])
    rows = table.take(np.arange(3))
    colours = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    shown = rows["image_latents"][:, :, 0, 0, 0]
    assert rows["image_latents"].shape == (3, 3, *TinyWan.options["latent_shape"][1:])
    assert np.allclose(shown, colours, atol=1e-6) and not np.allclose(shown, colours.flip(0), atol=0.5)
    own = family.encode_prompts([f"a picture {name[0]}" for name in COLOURS])
    assert rows["prompt"].tolist() == ["a picture a", "a picture b", "a picture c"]
    assert np.allclose(rows["prompt_embeds"], own["prompt_embeds"], atol=1e-5)
    assert not np.allclose(rows["prompt_embeds"][::-1], own["prompt_embeds"], atol=1e-2)
    assert family.conditions(rows)["image_latents"].shape[1] == 3


def test_a_family_that_begins_at_a_picture_takes_no_texts_alone(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n")
    wan = recipe_family(recipe_of("wan", teacher, image_channels=3))
    with pytest.raises(UserError, match=r"^prompts.path: family 'wan' begins at a picture here: a folder of pictures"):
        texts_for(wan, str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="family 'digits' takes no first frames"):
        recipe_family(parse_recipe({"name": "x", "method": {"name": "phased"}}, "x")).encode_first_frames(torch.ones(1))


def test_what_is_encoded_decides_the_tables_name(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    register_family(FirstFrames)
    (tmp_path / "a.txt").write_text("a fox\n")

    def key(name: str, path: Path, batch: int = 2, **options: Any) -> str:
        family = recipe_family(recipe_of(name, teacher, **options))
        texts = texts_for(family, str(path))
        assert texts is not None
        return encoded_facts(family, texts, batch).key()

    own = key("wan", tmp_path / "a.txt")
    same = [key("wan", tmp_path / "a.txt", gradient_checkpointing=True, latent_shape=[4, 5, 8, 6])]
    (tmp_path / "b.txt").write_text("\ufeffa fox\r\n\r\n")
    same.append(key("wan", tmp_path / "b.txt"))
    assert set(same) == {own}
    others = [key("wan", tmp_path / "a.txt", 3), key("wan", tmp_path / "a.txt", negative_prompt="blurry")]
    others += [key("wan", tmp_path / "a.txt", dtype="bfloat16")]
    images = [key("first-frames", pictures, image_channels=3, latent_shape=[4, n, 8, 6]) for n in (3, 5)]
    Image.new("RGB", (30, 20), "white").save(pictures / "b.png")
    images.append(key("first-frames", pictures, image_channels=3, latent_shape=[4, 3, 8, 6]))
    (tmp_path / "a.txt").write_text("a wolf\n")
    others.append(key("wan", tmp_path / "a.txt"))
    assert len({own, *others, *images}) == 1 + len(others) + len(images)


def test_a_text_that_is_too_long_is_counted(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n" + "fox " * 300 + "\n")
    result = encoded(recipe_of("wan", teacher), tmp_path / "a.txt", 0)
    assert (result[KIND], result[CUT]) == ("", 1)


def test_a_worker_tells_what_is_wrong(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    register_family(FirstFrames)
    (pictures / "b.png").write_bytes(b"no picture")
    result = encoded(recipe_of("first-frames", teacher, image_channels=3), pictures, 0)
    assert result[KIND] == "UserError" and "b.png' cannot be read as a picture" in result[WORDS]
    assert "\n" not in result[WORDS]


def test_a_run_knows_its_table(tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "x", "method": {"name": "phased"}, "prompts": {"path": "a.csv", "column": "b"}}, "x")
    assert with_table(recipe, tmp_path) is recipe
    note_table(tmp_path, "/cache/k")
    found = with_table(recipe, tmp_path).prompts
    assert (found.path, found.column) == ("/cache/k", None)


def test_a_run_goes_on_with_the_texts_that_it_began_with(teacher: Path, tmp_path: Path) -> None:
    """Also by another cache and in other batches; others under the same path are refused, as another teacher is."""
    (tmp_path / "a.txt").write_text("a fox\n")
    recipe = recipe_of("wan", teacher)
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"path": str(tmp_path / "a.txt")})})
    family = recipe_family(recipe)
    texts = texts_for(family, str(tmp_path / "a.txt"))
    assert texts is not None
    table = EncodedTable(str(tmp_path / "table"), encoded_facts(family, texts, 32), "prompts.cache")
    table.claim()
    check_same_texts(recipe, tmp_path)  # nothing is known
    note_table(tmp_path, table.place)
    check_same_texts(recipe, tmp_path)
    (tmp_path / "a.txt").write_text("a wolf\n")
    with pytest.raises(UserError, match=r"^prompts.path: '.*a.txt' holds other prompts than the run in .* began with"):
        check_same_texts(recipe, tmp_path)
    (tmp_path / "table" / "encoded.json").unlink()
    check_same_texts(recipe, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.txt", "--out", "t"], "--recipe, --teacher: give --recipe RECIPE, or --teacher PATH and --family NAME"),
        (["a.txt", "--teacher", "T", "--out", "t"], "--recipe, --teacher: give"),
        (["a.txt", "--recipe", "digits", "--out", "t"], "PROMPTS 'a.txt': it holds texts, and family 'digits' has no"),
        (["b.txt", "--recipe", "digits", "--out", "t"], "PROMPTS: no file"),
        (["d", "--recipe", "digits", "--out", "t"], "PROMPTS 'd': neither texts"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a fox\n")
    (tmp_path / "d").mkdir()
    assert command(["encode", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"raydmd: {expected}") and err.count("\n") == 1
    assert not (tmp_path / "t").exists()
