"""Without the extras the package trains and evaluates; what needs one says in a line how to install it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from raydmd.cli import run
from raydmd.extras import EXTRAS

ROOT = Path(__file__).parents[2]
WORDS = {
    "serve nowhere": "raydmd serve: the package fastapi is not installed here: pip install 'raydmd[serve]'",
    "bench serve --run nowhere": "raydmd bench serve: the package fastapi is not installed here",
    "validate SERVE": "the package fastapi is not installed here: pip install 'raydmd[serve]'",
}

WITHOUT = """
import sys
for name in {modules}:
    sys.modules[name] = None
import raydmd.cli, raydmd.entry
import raydmd.evaluation.evaluate, raydmd.evaluation.report, raydmd.evaluation.pictures, raydmd.export.export
import raydmd.methods.local, raydmd.runtime.launch, raydmd.runtime.pretrain, raydmd.runtime.pairs, raydmd.runtime.encode
sys.exit(raydmd.cli.run(["recipes", "digits"]))
"""


@pytest.mark.parametrize("words", WORDS)
def test_a_command_without_its_extra(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "serve.yaml").write_text("applications: []\n")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run([str(tmp_path / "serve.yaml") if word == "SERVE" else word for word in words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and WORDS[words] in err


def test_training_imports_none_of_them() -> None:
    """aiohttp stays: Ray's own agents need it."""
    modules = [name for names in EXTRAS.values() for name in names if name != "aiohttp"] + ["ray.serve"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(modules=modules)], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "name: digits" in done.stdout, done.stderr


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {*EXTRAS, "deepspeed", "docs", "quantization", "test", "wandb"} == set(extras)
    for name, modules in EXTRAS.items():
        packages = " ".join(extras[name]).replace("-", "_")
        assert all(module in packages for module in modules)
        assert not any(line.startswith(modules) for line in project["dependencies"])
    assert "raydmd[serve,video,docs]" in extras["test"]
