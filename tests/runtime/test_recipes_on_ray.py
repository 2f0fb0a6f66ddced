"""A paper's recipe in miniature on Ray: from its texts to its experts, and again."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raydmd.cli import run
from raydmd.runs.run import Run

pytestmark = pytest.mark.runtime


def test_a_recipe_in_miniature(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "run"
    command = ["distill", "wan2.2-t2v-phased", "--set", "teacher.path=tiny", "--set", "method.fake_updates=1"]
    command += ["--set", "iterations=[1, 1]", "--out", str(folder)]
    assert run(command) == 0
    said = capfd.readouterr().out
    assert said.count("a random tiny 'wan22' stands for the teacher") == 1 and "prompts: 20 encoded" in said
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (kept["teacher"]["path"], kept["teacher"]["tiny"], kept["prompts"]["path"]) == (None, "wan22", None)
    made = Run(folder)
    assert len(made.trained_phases()) == 2 and made.family.path == str((folder / "teacher").resolve())
    assert {key.partition(".")[0] for key in made.expert_state(0)} == {"transformer"}
    assert not list(folder.rglob("*.part"))
    assert run(command) == 0
    assert "is finished: nothing to do" in capfd.readouterr().out
