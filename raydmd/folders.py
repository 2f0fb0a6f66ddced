"""What is where in a run's folder. Imports nothing heavy, so that small actors stay small."""

import json
from pathlib import Path
from typing import Any


def expert_file(folder: Path, index: int) -> Path:
    """Return the file of expert ``index`` (0 for the first) in a run's folder."""
    return folder / "experts" / f"phase-{index + 1}" / "model.safetensors"


def own_teacher(folder: Path) -> str:
    """Return where a run keeps the teacher that it trained itself."""
    return str((folder / "teacher").resolve())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return a JSON-lines file's records; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
