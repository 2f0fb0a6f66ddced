"""`raydmd validate` and `raydmd distill` refuse the same recipes, in the same words, before anything is started."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub import COMMIT, put_in_cache
from test_families_diffusers import SHAPES, WIDTH, rows
from test_teacher_folders import edit, new

from raydmd.cli import run as command
from raydmd.data.prompts import write_prompts

HUB_NAME = "hf://Someone/tiny-wan"


@pytest.fixture(scope="module")
def place(tmp_path_factory, teachers: dict[str, Path]) -> Path:
    """Files that recipes name: teachers and prompts."""
    place = tmp_path_factory.mktemp("recipes")
    new(place / "wan", "wan")
    edit(new(place / "two", "wan") / "model_index.json", transformer_2=["diffusers", "X"], boundary_ratio=None)
    shutil.copytree(place / "two" / "transformer", place / "two" / "transformer_2")
    edit(new(place / "edit", "qwen_image") / "model_index.json", _class_name="QwenImageEditPipeline")
    (place / "ring").symlink_to(teachers["ring"])
    write_prompts(place / "right.parquet", rows())
    write_prompts(place / "few.parquet", {"words": ["a", "b"]})
    (place / "texts.txt").write_text("a fox\n")
    (place / "latin.txt").write_bytes(b"a fox\n\xfcber\n")
    wide = np.zeros((2, 7, WIDTH + 1), dtype=np.float32)
    write_prompts(place / "wide.parquet", {"prompt_embeds": wide, "negative_prompt_embeds": wide})
    (place / "torn.parquet").write_bytes(b"PAR1 and no more")
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def wan(teacher: str = "wan", prompts: str | None = "right.parquet", **options: Any) -> dict[str, Any]:
    name = "qwen_image" if teacher == "edit" else "wan"
    section = {"family": name, "path": f"HERE/{teacher}", "options": {"latent_shape": SHAPES[name], **options}}
    return {"teacher": section, "prompts": {"path": prompts and f"HERE/{prompts}"}}


def written(tree: dict[str, Any] | str, place: Path, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    if isinstance(tree, dict):
        tree = {"method": {"name": "phased"}, **tree}
    text = tree if isinstance(tree, str) else yaml.safe_dump(json.loads(json.dumps(tree).replace("HERE", str(place))))
    file.write_text(text)
    return file


WRONG: dict[str, tuple[dict[str, Any] | str, str]] = {
    "method": ({"method": {"name": "fased"}}, "method.name: no method 'fased'; did you mean 'phased'?"),
    "steps": ({"method": {"name": "phased", "steps": 3}}, "method.steps: 3 steps do not divide into 2 phases"),
    "phases": ({"method": {"name": "dmd", "phases": 2}}, "method.phases: dmd has 1 phase"),
    "iterations": ({"iterations": [1, 2, 3]}, "iterations: 3 numbers for 2 phases"),
    "guidance": ({"teacher": {"guidance_scale": 0.0}}, "teacher.guidance_scale"),
    "family": ({"teacher": {"family": "rnig"}}, "teacher.family: no family 'rnig'; did you mean 'ring'?"),
    "option": ({"teacher": {"options": {"widht": 3}}}, "teacher.options.widht: .*did you mean 'width'"),
    "option's value": ({"teacher": {"options": {"width": 63}}}, "teacher.options: .*width .63. is even"),
    "no teacher": ({"teacher": {"path": "HERE/wna"}}, "teacher.path: no folder '.*wna'; did you mean 'wan'?"),
    "another family's": ({"teacher": {"path": "HERE/ring"}}, "is of family 'ring', not 'digits'"),
    "an unknown key": ({"batch": {"sice": 8}}, "unknown key 'batch.sice'; did you mean 'size'?"),
    "a range": ({"batch": {"size": 9, "micro": 4}}, "batch.micro .4. must divide"),
    "a place": ({"checkpoint": {"path": "s4://bucket/runs"}}, "checkpoint.path: unknown scheme 's4'"),
    "no path": ({"teacher": {"family": "wan", "options": {"latent_shape": [4, 3, 8, 6]}}}, "family 'wan' needs"),
    "no prompts": (wan(prompts=None), "prompts.path: family 'wan' ships no prompts"),
    "a missing file": (wan(prompts="rihgt.parquet"), "prompts: no file '.*'; did you mean 'right.parquet'?"),
    "a column": (wan(prompts="few.parquet"), "prompts: .* has no column 'prompt_embeds'"),
    "texts": (wan(prompts="texts.txt"), "prompts.path: it holds texts, and the teacher '.*' has no text_encoder"),
    "no UTF-8": (wan(prompts="latin.txt"), "prompts.path: line 2 of '.*latin.txt' is not UTF-8"),
    "no texts": (wan(prompts="txets.txt"), "prompts.path: no file '.*'; did you mean 'texts.txt'"),
    "a torn file": (wan(prompts="torn.parquet"), "is not a Parquet file"),
    "another width": (wan(prompts="wide.parquet"), "'prompt_embeds' is of width 17, but the teacher takes 16"),
    "a shape": (wan(latent_shape=[4, 3, 7, 6]), "teacher.options.latent_shape: .* is not divisible"),
    "a dtype": (wan(dtype="bfloat61"), "teacher.options.dtype: no 'bfloat61'; did you mean 'bfloat16'?"),
    "a variant": (wan(variant="fp16"), "teacher.options.variant: .* has no variant 'fp16'"),
    "two transformers": (wan("two"), "has two transformers"),
    "another pipeline": (wan("edit"), "is of a QwenImageEditPipeline"),
    "a hub's name": ({**wan(), "teacher": {**wan()["teacher"], "path": "hf://wan"}},
                     "'hf://wan' is not hf://owner/name"),
    "a bare name": ({**wan(), "teacher": {**wan()["teacher"], "path": "Wan-AI/Wan2.1"}},
                    "no folder 'Wan-AI/Wan2.1'; on the hub it is hf://Wan-AI/Wan2.1"),
    "a key twice": ("seed: 1\nseed: 2\n", "line 2: key 'seed' is given twice"),
    "nothing": ("# a comment\n", "nothing in it"),
    "tabs": ("seed:\n\t- 1\n", "not readable as YAML"),
    "two recipes": ("seed: 1\n---\nseed: 2\n", "not readable as YAML: expected a single document"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_both_refuse_it_in_the_same_words(name: str, place: Path, tmp_path: Path, capsys: Any) -> None:
    tree, words = WRONG[name]
    file, said = written(tree, place, tmp_path), []
    for arguments in (["validate", str(file)], ["distill", str(file), "--out", str(tmp_path / "run")]):
        assert command(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        said.append(err.removeprefix("raydmd: ").removeprefix(f"{file}: "))
    assert said[0] == said[1]
    assert re.search(words, said[0]), said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({}, ""),
        ({"checkpoint": {"path": "s3://bucket/runs"}}, "checkpoint.path: 's3://bucket/runs' is not looked at"),
        ({"prompts": {"path": "gs://bucket/p.parquet"}}, "prompts.path: 'gs://bucket/p.parquet' is not looked at"),
        ({"runtime": {"fake": {"labels": {"zone": "b"}}}}, "runtime.fake: whether its resources and labels are there"),
    ],
)
def test_what_only_others_can_tell_is_a_note(more, note: str, place: Path, tmp_path: Path, capsys: Any) -> None:
    file = written({**wan(), **more}, place, tmp_path)
    assert command(["validate", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and out.startswith(f"ok {file} (recipe; ") and note in out


def test_of_the_hub_what_is_here_is_checked(place: Path, tmp_path: Path, offline: Path, capsys: Any) -> None:
    tree = wan()
    tree["teacher"]["path"] = HUB_NAME
    file = written(tree, place, tmp_path)
    assert command(["validate", str(file)]) == 0
    assert f"'{HUB_NAME}' is not, or not whole, in this machine's cache" in capsys.readouterr().out
    file = written({**tree, "method": {"name": "fased"}}, place, tmp_path)
    assert command(["validate", str(file)]) == 2 and "did you mean 'phased'" in capsys.readouterr().err
    file = written({**tree, "prompts": {"path": "HERE/few.parquet"}}, place, tmp_path)
    assert command(["validate", str(file)]) == 2 and "no column 'prompt_embeds'" in capsys.readouterr().err
    put_in_cache(place / "two", offline, "Someone/tiny-wan", COMMIT)
    assert command(["validate", str(written(tree, place, tmp_path))]) == 2
    assert "two transformers" in capsys.readouterr().err


def test_unknown_kinds_of_file_are_said_to_be_unknown(tmp_path: Path, capsys: Any) -> None:
    for content in (b"\x89PNG\r\n\x1a\n\xff", b"just words\n", b"services: {web: {image: x}}\n", b"- 1\n"):
        (tmp_path / "file").write_bytes(content)
        assert command(["validate", str(tmp_path / "file")]) == 2
        assert "unknown kind of file" in capsys.readouterr().err
    (tmp_path / "file").write_text("apiVersion: v1\nkind: Deployment\nmetadata: {name: a}\n")
    assert command(["validate", str(tmp_path / "file")]) == 0
    assert capsys.readouterr().out.startswith(f"unknown {tmp_path / 'file'} (Deployment")  # and not "ok"
