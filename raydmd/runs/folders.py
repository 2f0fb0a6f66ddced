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
    """Return a JSON-lines file's records; lines that a crash or a damaged disk broke are left out."""
    return read_whole_lines(path)[0]


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a JSON-lines file's records, and the number of lines that are none."""
    if not path.is_file():
        return [], 0
    records, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line.decode()) if line.strip() else None
        except (ValueError, RecursionError):
            record = line
        if isinstance(record, dict):
            records.append(record)
        elif record is not None or line.strip():
            broken += 1
    return records, broken
