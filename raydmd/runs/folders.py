"""What is where in a run's folder, and what a folder is. Imports nothing heavy, so that small actors stay small."""

import json
from collections.abc import Sequence
from pathlib import Path

from raydmd.errors import nearest

RECIPE = "recipe.yaml"
EXPORT = "export.json"
PIPELINE = "model_index.json"
ADAPTERS = ("*.safetensors", "adapters/*.safetensors", "phase-*/adapter_config.json", "adapter_config.json")


def expert_file(folder: Path, index: int) -> Path:
    """Return the file of expert ``index`` (0 for the first) in a run's folder."""
    return folder / "experts" / f"phase-{index + 1}" / "model.safetensors"


def own_teacher(folder: Path) -> str:
    """Return where a run keeps the teacher that it trained itself."""
    return str((folder / "teacher").resolve())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / RECIPE).is_file()


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of a run."""
    return (folder / EXPORT).is_file()


def other_than(folder: Path, wanted: Sequence[str]) -> str:
    """Return words on a folder that is not what is wanted: what it is instead, and what to do.

    Args:
        folder: the folder, which need not be there.
        wanted: files by which what is wanted is known, `RECIPE` or `EXPORT`.
    """
    if is_run(folder):
        return "it is a run, and no export"
    if is_export(folder):
        return "it is an export, which `raydmd generate` and `raydmd serve` take"
    if _is_teacher(folder):
        return f"it is a teacher, which `raydmd distill RECIPE --set teacher.path={folder}` makes a student of"
    if any(any(folder.glob(pattern)) for pattern in ADAPTERS):
        return (f"it has weights, but no {EXPORT}, in which `raydmd export` says their times and their base model; "
                f"export the run again")  # fmt: skip
    siblings = [path.parent.name for name in wanted for path in folder.parent.glob(f"*/{name}")]
    lacks = f"it has no {wanted[0]}" if len(wanted) == 1 else f"it has neither {' nor '.join(wanted)}"
    return f"{lacks}{nearest(folder.name, sorted(set(siblings)))}"


def _is_teacher(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline's, a network's, or one of `raydmd pretrain`."""
    if (folder / PIPELINE).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ("_class_name" in config or {"family", "options"} <= set(config))
