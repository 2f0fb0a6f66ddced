"""The notebook in examples/, in a Jupyter kernel, whose cells run inside its event loop."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "digits.ipynb"


def test_every_cell_runs(teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distil, sample, evaluate and a mistake; with a small teacher and few iterations."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for written, smaller in (
        ('"pretrain.iterations": 3000,', f'"teacher.path": "{teachers["digits"]}",'),
        ('"iterations": 200,', '"iterations": 2, "evaluation.samples": 100,'),
    ):
        assert cells[0].source.count(written) == 1
        cells[0].source = cells[0].source.replace(written, smaller)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    said = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells]
    assert said[0] == "phased digits 64\n"
    assert said[1] == "True ['1 to 0.5', '0.5 to 0']\n"
    assert said[2].startswith("[(1, ") and any("image/png" in output.get("data", {}) for output in cells[2].outputs)
    assert "teacher {'fd_teacher': " in said[3] and "student {'fd_teacher': " in said[3]
    assert "did you mean 'phases'?" in said[4]
