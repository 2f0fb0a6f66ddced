"""The benchmarks can be started, and what they take from the package is there."""

import importlib
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ and Path(module.__file__ or "").parent == FOLDER


def test_a_cell_of_small_quality_is_known_by_the_source_of_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    small_quality = importlib.import_module("small_quality")
    monkeypatch.setattr(small_quality, "measure", importlib.import_module)  # another function: another hash
    changed = small_quality.source.__wrapped__()
    monkeypatch.undo()
    assert len(changed) == 32 and changed != small_quality.source.__wrapped__()


def test_half_precision_is_compared_for_every_diffusers_family(tmp_path: Path) -> None:
    found = importlib.import_module("gpu_check").half_precision("cpu", tmp_path)
    assert {"qwen_image_bfloat16_apart", "wan_bfloat16_apart"} <= found.keys()
    assert all(math.isfinite(value) for value in found.values()) and found["wan_bfloat16_apart"] < 0.05
