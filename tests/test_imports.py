"""Imports run one way, as pyproject.toml's contracts say: what is below never imports what is above."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = "from importlinter.cli import lint_imports_command; lint_imports_command()"
LINT = [sys.executable, "-c", COMMAND, "--no-cache", "--no-logo", "pyproject.toml"]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=root, capture_output=True, text=True, timeout=300)


def test_imports_run_one_way() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("objectives/regression.py", "import raydmd.training.generator", "raydmd.objectives is not allowed to import"),
        ("training/teacher.py", "import ray", "raydmd.training is not allowed to import ray"),
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path: Path, file: str, line: str, words: str) -> None:
    shutil.copytree(ROOT / "raydmd", tmp_path / "raydmd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "raydmd" / file
    source.write_text(source.read_text() + f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and words in done.stdout, done.stdout + done.stderr
