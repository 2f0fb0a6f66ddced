"""What is where in a run's folder. Imports nothing heavy, so that small actors stay small."""

from pathlib import Path


def expert_file(folder: Path, index: int) -> Path:
    """Return the file of expert ``index`` (0 for the first) in a run's folder."""
    return folder / "experts" / f"phase-{index + 1}" / "model.safetensors"


def own_teacher(folder: Path) -> str:
    """Return where a run keeps the teacher that it trained itself."""
    return str((folder / "teacher").resolve())
