"""A run on captioned pictures: the first frame of a prompt of one's own, and what is said where none can be had."""

from pathlib import Path
from typing import Any

import pytest
from picture_runs import captioned_pictures, encoded_recipe
from run_folders import make_run

from raydmd.cli import run as command
from raydmd.data.prompts import PromptTable
from raydmd.evaluation.validation_prompts import preview_words
from raydmd.runs.run import recipe_family


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encode the folder, and train on it, in this process."""
    root = tmp_path_factory.mktemp("run")
    encoded = encoded_recipe(root, pictures)
    family = recipe_family(encoded)
    assert preview_words(encoded, family, 3) == ["two foxes", "row 1", "two foxes"]
    return make_run(encoded, root / "run", PromptTable(str(encoded.prompts.path), family.condition_columns)).folder


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
