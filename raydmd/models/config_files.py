"""Reading the small JSON files beside a pretrained model's weights, without its weights and without diffusers."""

import json
from pathlib import Path
from typing import Any

from raydmd.errors import UserError
from raydmd.models.hub import HUB, fetch, parse_hub_name, resolve_commit


def read_config(place: str, subfolder: str, name: str = "config.json") -> dict[str, Any] | None:
    """Return the JSON object in ``place/subfolder/name``, or None where there is no such file.

    Args:
        place: a model's folder, or ``hf://owner/name@revision``.
        subfolder: of the part, as ``vae``.
        name: of the file.

    Raises:
        UserError: the file is no JSON object, or the hub cannot be asked.
    """
    file = _on_hub(place, subfolder, name) if place.startswith(HUB) else Path(place) / subfolder / name
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"teacher.path: {file} is not readable as a JSON object")
    return config


def _on_hub(place: str, subfolder: str, name: str) -> Path:
    return fetch(resolve_commit(parse_hub_name(place)), [f"{subfolder}/{name}"]) / subfolder / name
