"""DMD2's GAN on a folder of real pictures: its references are the folder's, each once an epoch."""

import json
import math
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from raydmd.cli import run as command
from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.data.digits import load_digits
from raydmd.data.row_order import RowGroup, RowOrder
from raydmd.errors import UserError
from raydmd.methods.loading import parse_recipe
from raydmd.methods.local import train
from raydmd.methods.registry import build_method, plan_phases
from raydmd.recipe_check import absolute, check
from raydmd.runs.run import recipe_family
from raydmd.training.gan import ReferencedGenerator
from raydmd.training.messages import PromptBatch

COUNT = 24  # of pictures: one and a half batches
KEY = "method.dmd2.pictures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the shipped digits as PNGs, ink white, with their labels; the rows are not in the files' order."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits()
    rows = []
    for number in reversed(range(COUNT)):
        name = f"{'even' if number % 2 == 0 else 'odd'}/{number:04}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = ((images[number, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / name)
        rows.append(json.dumps({"file_name": name, "label": int(labels[number])}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def recipe(quick: Any, folder: Path) -> Recipe:
    made: Recipe = quick("digits", "method.name=dmd2", f"{KEY}={folder}", "method.discriminator.width=16")
    return made


def references(recipe: Recipe, iterations: int, micro: int) -> tuple[Tensor, Tensor]:
    """Return the references of some iterations and their labels, as a worker of its own hands them out."""
    family = recipe_family(recipe)
    generator = ReferencedGenerator(recipe, family, family.load_teacher(), plan_phases(recipe))
    generator.start_phase(0, 0)
    wanted = [(n, update, start) for n in range(iterations) for update in range(recipe.method.fake_updates)
              for start in range(0, recipe.batch.size, micro)]  # fmt: skip
    made = {each: generator.references(*each[:2], PromptBatch(each[2], micro, {})) for each in reversed(wanted)}
    for (n, update, start), samples in made.items():
        assert (samples.batch_id.start, samples.batch_id.draw) == (start, n * generator.draws + update)
    found = [made[each] for each in wanted]
    return torch.cat([each.x_s for each in found]), torch.cat([each.conditions["label"] for each in found])


def numbers(x_0: Tensor) -> list[int]:
    """Return which shipped digit each reference is, to half a step of 8 bits."""
    images, _ = load_digits()
    distance = (x_0[:, None] - images[None]).abs().amax((2, 3, 4))
    assert float(distance.min(1).values.max()) <= 1 / 255 + 1e-6
    return distance.argmin(1).tolist()


def test_references_are_the_folders_pictures_each_once_an_epoch(recipe: Recipe) -> None:
    x_0, labels = references(recipe, 3, recipe.batch.size)
    assert x_0.shape == (96, 1, 8, 8)
    which = numbers(x_0)
    epochs = [which[start : start + COUNT] for start in range(0, 96, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != sorted(epochs[0])
    assert labels.tolist() == load_digits()[1][which].tolist()


def test_who_asks_and_how_many_changes_nothing_and_the_seed_does(recipe: Recipe) -> None:
    x_0, labels = references(recipe, 2, 16)
    for micro in (1, 4):
        again, also = references(recipe, 2, micro)
        assert torch.equal(x_0, again) and torch.equal(labels, also)
    other, _ = references(recipe.model_copy(update={"seed": 1}), 2, 16)
    assert not torch.equal(x_0, other)


def test_it_trains_on_them_and_the_teacher_makes_none(recipe: Recipe, prompts: Any) -> None:
    family, lines = recipe_family(recipe), []
    assert build_method(recipe).pairs == 0
    run = train(recipe, family, family.load_teacher(), prompts("digits"),
                lambda n, figures: lines.append(figures), iterations=2)  # fmt: skip
    assert run.parts["generator"].pairs is None and run.parts["fake"].updates == 4
    assert len(lines) == 2
    for figures in lines:
        for role, updates in figures.items():
            for stats in updates:
                assert math.isfinite(stats.norm) and not stats.zeroed
                assert all(math.isfinite(value) for _, row in stats.micro for value in row.values()), role
        assert {"loss_classifier", "logit_real"} <= figures["fake"][0].micro[0][1].keys()


def test_the_pictures_reach_the_classifier(recipe: Recipe, prompts: Any, folder: Path, tmp_path: Path) -> None:
    """The same run on a folder of blank pictures has another classifier's loss from its first update on."""
    blank = tmp_path / "blank"
    shutil.copytree(folder, blank)
    for file in blank.glob("*/*.png"):
        Image.new("L", (8, 8)).save(file)
    dmd2 = recipe.method.dmd2.model_copy(update={"pictures": str(blank)})  # type: ignore[attr-defined]
    other = recipe.model_copy(update={"method": recipe.method.model_copy(update={"dmd2": dmd2})})
    seen = []
    for each in (recipe, recipe, other):
        family, losses = recipe_family(each), []
        train(each, family, family.load_teacher(), prompts("digits"),
              lambda n, figures, to=losses: to.append(figures["fake"][1].micro[0][1]["loss_classifier"]),
              iterations=1)  # fmt: skip
        seen.append(losses)
    assert seen[0] == seen[1] != seen[2]


# ---- the recipe


def test_the_teachers_samples_and_pictures_exclude_each_other(quick: Any, folder: Path) -> None:
    with pytest.raises(UserError, match="method.dmd2.references: the teacher makes no samples where .* leave one"):
        quick("digits", "method.name=dmd2", f"{KEY}={folder}", "method.dmd2.references=64")
    assert build_method(quick("digits", "method.name=dmd2", "method.dmd2.references=64")).pairs == 64
    assert build_method(quick("digits", "method.name=dmd2")).pairs == 1024


def test_a_run_takes_the_folder_by_its_absolute_path(
    recipe: Recipe, quick: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for given in (folder.name, f"./{folder.name}", f"~/{folder.name}"):
        made = absolute(quick("digits", "method.name=dmd2", f"{KEY}={given}", "method.discriminator.width=16"))
        assert made == absolute(recipe)
    assert parse_recipe(yaml.safe_load(dump_recipe(made)), "recipe.yaml") == made  # as a run that goes on reads it
    assert absolute(recipe).method.dmd2.pictures == str(folder.resolve())  # type: ignore[attr-defined]
    assert absolute(quick("digits")) == quick("digits").model_copy(update={"teacher": absolute(recipe).teacher})


def test_a_folder_that_is_right_is_accepted(recipe: Recipe, folder: Path, tmp_path: Path, capsys: Any) -> None:
    check(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method: {{name: dmd2, dmd2: {{pictures: {folder}}}}}\n")
    assert command(["validate", str(file)]) == 0
    assert capsys.readouterr().out == f"ok {file} (recipe)\n"


def changed(folder: Path, to: Path, name: str) -> Path:
    """Copy the folder with a fault."""
    shutil.copytree(folder, to)
    rows = (to / "metadata.jsonl").read_text().splitlines()
    if name == "label":
        rows[3] = rows[3].replace('"label": ', '"label": 7')
    if name == "column":
        rows = [row.replace('"label"', '"lable"') for row in rows]
    if name == "file_name":
        rows[5] = rows[5].replace(".png", ".pgn")
    (to / "metadata.jsonl").write_text("\n".join(rows))
    if name == "torn":
        first = to / "even" / "0000.png"
        first.write_bytes(first.read_bytes()[:-40])
    if name == "empty":
        for file in to.glob("*/*.png"):
            file.unlink()
    if name == "metadata":
        (to / "metadata.jsonl").unlink()
    return to


FAULTS = {
    "label": "column 'label' has values outside 0..9, e.g. 70 (line 4 of 'HERE/metadata.jsonl', 'even/0020.png')",
    "column": "line 1 of 'HERE/metadata.jsonl' has no 'label'; did you mean 'lable'?",
    "file_name": "line 6 of 'HERE/metadata.jsonl': 'even/0018.pgn' is no picture in 'HERE'; did you mean "
    "'even/0018.png'?",
    "torn": "'HERE/even/0000.png' cannot be read as a picture: ",
    "empty": "folder 'HERE' has no pictures (.bmp, .jpeg, .jpg, .png, .webp)",
    "metadata": "'HERE' has no metadata.jsonl or metadata.csv with 'file_name', 'label' of each picture",
}


@pytest.mark.parametrize("name", FAULTS)
def test_both_commands_refuse_a_folder_before_anything_is_started(
    name: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    wrong = changed(folder, tmp_path / "wrong", name)
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(f"method: {{name: dmd2, dmd2: {{pictures: {wrong}}}}}\n")
    for arguments in (["validate", str(file)], ["distill", str(file), "--out", str(out)]):
        assert command(arguments) == 2
        printed, said = capsys.readouterr()
        words = said.removeprefix("raydmd: ").removeprefix(f"{file}: ")
        assert printed == "" and words.count("\n") == 1
        assert words.startswith(f"{KEY}: {FAULTS[name].replace('HERE', str(wrong))}"), words
    assert not out.exists()


def test_distill_refuses_what_is_not_there_and_who_takes_none(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path / "run")]
    for arguments, words in (
        (["digits-dmd2", "--set", f"{KEY}={folder}s"], f"{KEY}: no folder '{folder}s'; did you mean '{folder.name}'?"),
        (["digits-dmd2", "--set", f"{KEY}=s3://bucket/x"], f"{KEY}: 's3://bucket/x' is no folder of a file system"),
        (["ring", "--set", "method.name=dmd2", "--set", f"{KEY}={folder}"],
         f"{KEY}: family 'ring' does not encode pictures into its latents"),
        (["digits-dmd2", "--set", "method.dmd2.picture=x"], "did you mean 'pictures'?"),
    ):  # fmt: skip
        assert command(["distill", *arguments, *out]) == 2
        printed, said = capsys.readouterr()
        assert printed == "" and said.count("\n") == 1 and words in said, said
    assert not (tmp_path / "run").exists()


def test_a_picture_that_breaks_later_ends_the_run_in_one_line(quick: Any, folder: Path, tmp_path: Path) -> None:
    """Only the first picture is decoded beforehand."""
    shutil.copytree(folder, tmp_path / "later")
    torn = tmp_path / "later" / "odd" / "0007.png"
    torn.write_bytes(torn.read_bytes()[:40])
    made = quick("digits", "method.name=dmd2", f"{KEY}={tmp_path / 'later'}", "batch.size=24")
    check(made)
    with pytest.raises(UserError, match=f"^{KEY}: '{torn}' cannot be read as a picture: "):
        references(made, 1, 24)


def test_a_worker_that_does_not_see_the_folder_says_where_it_is(recipe: Recipe) -> None:
    dmd2 = recipe.method.dmd2.model_copy(update={"pictures": "/nowhere/digits"})  # type: ignore[attr-defined]
    made = recipe.model_copy(update={"method": recipe.method.model_copy(update={"dmd2": dmd2})})
    with pytest.raises(
        UserError, match=rf"^{KEY}: no folder '/nowhere/digits' \(on {platform.node()}: every generator"
    ):
        references(made, 1, 16)


def test_numbers_of_rows_are_those_of_the_files(recipe: Recipe, folder: Path) -> None:
    """The epoch's order is `RowOrder`'s on the sorted names."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.glob("*/*.png"))
    order = RowOrder(recipe.seed, "references", [RowGroup(COUNT, 0)]).rows(0, 32)
    expected = [int(Path(names[row]).stem) for row in order]
    x_0, _ = references(recipe, 1, 16)
    assert numbers(x_0) == expected and np.unique(order[:COUNT]).size == COUNT
