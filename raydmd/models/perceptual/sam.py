"""Segment Anything's image encoder (Kirillov et al. 2023), from a folder of transformers' SamModel or the hub."""

from pathlib import Path
from typing import Any

import torch

from raydmd.errors import UserError, nearest
from raydmd.models.base import one_line
from raydmd.models.diffusers.hub import HUB, cached_snapshot, fetch, parse_hub_name, resolve_commit
from raydmd.models.diffusers.weight_files import read_json

TINY = "tiny"
"""In place of a folder: a small encoder with random weights, the same each time, for recipes in miniature."""
FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def load_sam(source: str, key: str) -> Any:
    """Return the encoder in float32.

    Args:
        source: a folder, or ``owner/name`` on the hub, also as ``hf://owner/name@revision``; or `TINY`.
        key: of the recipe, that names it.

    Raises:
        UserError: it is not there, is another model, or cannot be read whole.
    """
    import transformers

    sam: Any = transformers.SamModel
    if source == TINY:
        return _tiny()
    folder = _folder(source, key)
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except UserError as error:
        raise _keyed(error, key) from error
    if kind != "sam":
        raise UserError(f"{key}: {folder / 'config.json'} is of a {kind}, not of a sam")
    try:
        model, told = sam.from_pretrained(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}: '{source}' cannot be loaded: {one_line(error)}") from error
    if missing := [name for name in told["missing_keys"] if name.startswith("vision_encoder.")]:
        raise UserError(f"{key}: the weights in '{source}' lack {missing[0]} and {len(missing) - 1} more")
    return model.vision_encoder.float()


def sam_is_here(source: str, key: str) -> bool:
    """Whether its files are on this machine.

    Raises:
        UserError: neither a folder nor a name on the hub.
    """
    if source == TINY or Path(source).is_dir():
        return True
    return cached_snapshot(_hub_name(source, key)) is not None


def _tiny() -> Any:
    from transformers import SamVisionConfig, SamVisionModel

    vision: dict[str, Any] = dict(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        mlp_dim=16, window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SamVisionModel(SamVisionConfig(**vision)).vision_encoder.float()


def _folder(source: str, key: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    hub = _hub_name(source, key)
    try:
        return fetch(resolve_commit(hub), FILES)
    except UserError as error:
        raise _keyed(error, key) from error


def _hub_name(source: str, key: str) -> Any:
    """Read a hub's name, of what is no folder."""
    try:
        return parse_hub_name(source)
    except UserError as error:
        folder = Path(source)
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, siblings)
        near = near if "did you mean" in near else ""
        raise UserError(f"{key}: '{source}' is neither a folder nor {HUB}owner/name{near}") from error


def _keyed(error: UserError, key: str) -> UserError:
    """Return an error of the hub's, or of a file's, under another key."""
    return UserError(str(error).replace("teacher.path", key, 1))
