"""Reading the small JSON files beside a pretrained model's weights, without its weights and without diffusers."""

from pathlib import Path
from typing import Any

from raydmd.models.diffusers.weight_files import read_json


def read_config(root: Path, subfolder: str, name: str = "config.json") -> dict[str, Any] | None:
    """Return the JSON object in ``root/subfolder/name``, or None where there is no such file.

    Args:
        root: a model's folder.
        subfolder: of the part, as ``vae``.
        name: of the file.

    Raises:
        UserError: the file is no JSON object.
    """
    file = root / subfolder / name
    return read_json(file) if file.is_file() else None
