"""Every shipped recipe, in miniature, by the local executor; and what a miniature changes of a recipe."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raydmd.cli import run as command
from raydmd.config.recipe import Recipe, dump_recipe, shipped_recipes
from raydmd.data.pictures import PictureFolder
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.data.tiny_prompts import tiny_prompts
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe, load_strangers_recipe
from raydmd.methods.local import Figures, train
from raydmd.methods.registry import plan_phases
from raydmd.models.base import IMAGE_COLUMN, Family
from raydmd.models.embedded.prompts import ensure_embedded_prompts
from raydmd.models.encoding import texts_for
from raydmd.recipe_check import check, check_encoded
from raydmd.runs.run import make_teacher, recipe_family, with_teacher

torch.set_num_threads(1)

NAMES = sorted(shipped_recipes())
PAPERS = [name for name in NAMES if name.partition("-")[0] not in ("digits", "ring")]
ROWS = 4  # prompts that are encoded here


def encode(family: Family, prompts: str, table: Path) -> str:
    """Encode some of a tiny teacher's texts in this process; return where they are."""
    texts = texts_for(family, prompts)
    if texts is None:
        return prompts
    if not table.is_file():
        columns = dict(family.encode_prompts(texts.texts[:ROWS]))
        if texts.pictures is not None:
            width, height = family.picture_size
            pictures = PictureFolder(prompts, (3, height, width), [], "prompts.path").take(np.arange(ROWS))
            columns[IMAGE_COLUMN] = family.encode_first_frames(pictures).numpy()
        write_prompts(table, columns)
    return str(table)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny teachers lie, which recipes share."""
    return tmp_path_factory.mktemp("teachers")


def in_miniature(name: str, teachers: Path, *overrides: str) -> tuple[Recipe, str]:
    """Return a recipe with its tiny teacher in place, and its table of prompts."""
    given = load_recipe(name, ["teacher.path=tiny", *overrides])
    folder = teachers / str(given.teacher.tiny)
    make_teacher(given, folder)
    recipe = with_teacher(given, folder)
    check(recipe)
    family = recipe_family(recipe)
    if recipe.prompts.path is None:
        return recipe, str(ensure_embedded_prompts(family, folder))
    place = encode(family, recipe.prompts.path, folder / "table.parquet")
    encoded = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"path": place})})
    check_encoded(encoded)
    return encoded, place


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_in_miniature(name: str, teachers: Path) -> None:
    recipe, prompts = in_miniature(name, teachers, "method.fake_updates=1")
    family, norms = recipe_family(recipe), dict[str, list[float]]()

    def record(iteration: int, figures: Figures) -> None:
        for role, made in figures.items():
            norms.setdefault(role, []).extend(stats.norm for stats in made)
            assert not any(sum(stats.zeroed.values()) for stats in made), role

    run = train(recipe, family, family.load_teacher(), PromptTable(prompts, family.condition_columns), record)
    phases = plan_phases(recipe, family.schedule.t_max)
    assert len(run.experts) == len(phases) and len(norms["generator"]) == 2
    assert all(math.isfinite(norm) and norm > 0 for made in norms.values() for norm in made)
    if name.startswith("wan2.2") and name.endswith("phased"):  # one of the teacher's networks an expert
        kinds = [{key.partition(".")[0] for key in expert} for expert in run.experts]
        assert kinds == [{"transformer"}, {"transformer_2"}]
    if "fake" in norms and recipe.method.name not in ("dmdx",):
        assert len(norms["fake"]) == 2
    if recipe.method.name == "dmdx":
        assert len(norms["latent"]) == 1 and len(norms["discriminator"]) == 1
        assert len(norms.get("pixel", [])) == (1 if name.startswith("sdxl") else 0)


def test_what_a_miniature_changes_and_what_not() -> None:
    whole, small = load_recipe("wan2.2-t2v-phased"), load_recipe("wan2.2-t2v-phased", ["teacher.path=tiny"])
    assert (small.teacher.path, small.teacher.tiny) == (None, "wan22")
    assert small.teacher.options == {"latent_shape": [4, 3, 8, 6], "gradient_checkpointing": True}
    assert (small.batch.size, small.batch.micro, small.iterations, small.teacher.steps) == (2, 1, [1, 1], 4)
    assert small.runtime.generator.gpus == 0 and small.runtime.generator.max_workers == 1
    assert small.optimizer == whole.optimizer and small.method.regression.pairs == 8
    assert small.method.model_copy(update={"regression": whole.method.regression}) == whole.method
    assert small.teacher.guidance_scale == whole.teacher.guidance_scale == 4


def test_what_the_command_line_sets_stays_and_a_run_is_not_made_smaller_again(tmp_path: Path) -> None:
    given = ["batch.size=6", "batch.micro=2", "teacher.path=tiny", "iterations=[9, 3]", "prompts.path=mine.txt"]
    small = load_recipe("qwen-image-t2i-phased", given)
    assert (small.batch.size, small.iterations, small.prompts.path) == (6, [9, 3], "mine.txt")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(small))
    assert load_recipe(str(file)) == small == load_strangers_recipe(file)


def test_a_teacher_is_the_same_each_time(teachers: Path, tmp_path: Path) -> None:
    recipe = load_recipe("sd15-t2i-dmd", ["teacher.path=tiny"])
    made = []
    for name in ("a", "b"):
        make_teacher(recipe, tmp_path / name)
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        made.append({str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files})
    assert made[0] == made[1] and "teacher/unet/diffusion_pytorch_model.safetensors" in made[0]
    prompts = tiny_prompts(tmp_path / "a" / "teacher")
    assert prompts is not None and len(Path(prompts).read_text().splitlines()) == 20


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_says_what_it_is(name: str, tmp_path: Path, capsys: Any) -> None:
    """Its paper and table or that it is none's, what it needs at full size; and it lacks what only the user has."""
    text = shipped_recipes()[name].read_text()
    head = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert "DMD" in head.split(".")[0] or "ADM" in head.split(".")[0]
    assert "Table" in head and "chosen here" in head and "teacher.path=tiny runs it in miniature" in head
    assert ("does not run on today's engine" in head) != ("fits one GPU" in head)
    assert command(["validate", name]) == 2
    needed = "teacher.path" if yaml.safe_load(text)["teacher"].get("path") is None else "prompts.path"
    assert f"{needed}: family" in capsys.readouterr().err
    assert command(["validate", name, "--set", "teacher.path=tiny"]) == 0
    assert "a random tiny" in capsys.readouterr().out


def test_what_cannot_be_made_small(tmp_path: Path) -> None:
    for given, words in (
        (["teacher.path=tiny", "teacher.tiny=wan23"], "teacher.tiny: no tiny model 'wan23'; did you mean 'wan22'?"),
        (["teacher.path=tiny", "teacher.tiny=sdxl"], "teacher.tiny: 'sdxl' is of family 'sdxl', not of 'wan'"),
        (["teacher.path=tiny", "teacher.family=wna"], "teacher.*did you mean 'wan'"),
        (["teacher.path=tiny", "method.name=fased"], "method.name: no method 'fased'; did you mean 'phased'?"),
    ):
        with pytest.raises(UserError, match=words):
            load_recipe("wan2.2-t2v-phased", given)


def test_a_recipe_of_a_newer_version(tmp_path: Path) -> None:
    file = tmp_path / "newer.yaml"
    file.write_text("version: 2\nmethod: {name: dmd}\nnew_key: 1\n")
    with pytest.raises(UserError, match=r"newer.yaml: version: 2 is newer than this raydmd's \(1\)"):
        load_recipe(str(file))
