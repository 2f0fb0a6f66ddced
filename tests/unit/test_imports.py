"""Imports run one way, as pyproject.toml's contracts say: what is below never imports what is above."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    "module", ["raydmd.cli", "raydmd.runtime.checkpoint.writer", "raydmd.runtime.recovery.control_caller"]
)
def test_processes_that_compute_nothing_do_not_import_torch(module: str) -> None:
    """It takes seconds and 200 MB: a message on bad input and a helper that is started again do without."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("name", "users"),
    [("euler_step", {"sampling/student.py", "training/score_network.py", "export/schedulers.py"}),
     ("renoise_step", {"sampling/student.py"}),
     ("integrate", {"sampling/teacher.py"})],
)  # fmt: skip
def test_there_is_one_few_step_and_one_many_step_loop(name: str, users: set[str]) -> None:
    """Training, previews, generate, evaluation and serving all go through them; what else takes steps is no sampler:
    a score network's own, from each sample's t, which ADM compares, and what a scheduler's steps are held against."""
    package = ROOT / "raydmd"
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if re.search(rf"\b{name}\(", p.read_text())}
    assert found - {"diffusion/solvers.py"} == users


def test_only_its_own_file_knows_a_methods_name() -> None:
    """Nothing but the registry, which imports them, and help texts of the recipe."""
    package = ROOT / "raydmd"
    text = re.compile(r"\b(PhasedDMD|TruncatedDMD|FewStepDMD|DMD)\b\(|[\"'](dmd-sgts|dmd-fewstep|phased)[\"']")
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if text.search(p.read_text())}
    assert found <= {"methods/phased.py", "methods/dmd_sgts.py", "methods/dmd_fewstep.py", "methods/dmd.py"}
    assert found


def test_no_two_test_files_have_one_name() -> None:
    """They are imported by it."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) > 100 and sorted(names) == sorted(set(names))
