"""The weights of a diffusers model on disk, held against its network by the files' headers: nothing is loaded."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydmd.errors import UserError, nearest
from raydmd.models.base import one_line
from raydmd.models.safetensors_files import TensorEntry, read_header

STEM, ENDING = "diffusion_pytorch_model", ".safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8")  # endings of scaled fp8's names
SHARD = re.compile(rf"{STEM}(?:\.(?P<variant>[\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?\{ENDING}")
OPTION = "teacher.options.variant"


def weight_files(folder: Path, variant: str) -> list[str]:
    """Return the names of the safetensors files that hold a model's weights, of a variant (``fp16``) or of none.

    Raises:
        UserError: ``teacher...: ...``: none of that variant, another format, or a shard that is missing.
    """
    middle = f".{variant}" if variant else ""
    index = folder / f"{STEM}{ENDING}.index{middle}.json"
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if index.name in names:
        return _indexed(index, names)
    if (single := f"{STEM}{middle}{ENDING}") in names:
        return [single]
    if any(re.fullmatch(rf"{re.escape(STEM + middle)}-\d{{5}}-of-\d{{5}}\{ENDING}", name) for name in names):
        raise UserError(f"teacher.path: {folder} has shards, but not {index.name}, which says what is in them")
    variants = sorted({found["variant"] or "" for name in names if (found := SHARD.fullmatch(name))})
    if variant and variants:
        others = [name for name in variants if name]
        raise UserError(f"{OPTION}: {folder} has no variant '{variant}'" + (nearest(variant, others) if others else
                        "; leave it out"))  # fmt: skip
    if variants:
        raise UserError(f"{OPTION}: {folder} has weights of a variant only; set it to {' or '.join(variants)}")
    for name in sorted(names):
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf")):
            raise UserError(f"teacher.path: {folder} has its weights in {name}; {STEM}{ENDING} is needed (load it with "
                            f"diffusers and save it with save_pretrained)")  # fmt: skip
        if name.endswith(ENDING):
            raise UserError(f"teacher.path: {folder} has {name}, but diffusers' name is {STEM}{ENDING}")
    raise UserError(f"teacher.path: {folder} has no weights ({STEM}{ENDING}, or shards and their index)")


def check_weights(folder: Path, files: Sequence[str], network: Any) -> None:
    """Hold weights on disk against a network.

    Args:
        folder: of the model.
        files: names of its safetensors files.
        network: the model of its config, on the meta device.

    Raises:
        UserError: ``teacher.path: ...``: tensors that are missing or unknown, whose names have a prefix, of other
            shapes, or that are quantized.
    """
    found: dict[str, TensorEntry] = {}
    for file in files:
        found |= read_header(folder / file).tensors
    _refuse_quantized(folder, found)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    ignored = re.compile("|".join(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ["(?!)"]))
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected and not ignored.search(name)]
    kind = type(network).__name__
    if (prefix := _prefix(found, expected)) and missing:
        raise UserError(f"teacher.path: in {folder} every tensor's name begins with '{prefix}', unlike a {kind}'s; "
                        f"save the weights without it")  # fmt: skip
    if missing:
        raise UserError(f"teacher.path: {folder} lacks {len(missing)} of the {len(expected)} tensors of the {kind} of "
                        f"its config, e.g. '{missing[0]}'{_instead(unknown)}")  # fmt: skip
    if unknown:
        raise UserError(f"teacher.path: {folder} has {len(unknown)} tensors that the {kind} of its config has not, "
                        f"e.g. '{unknown[0]}'")  # fmt: skip
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"teacher.path: '{name}' in {folder} is {list(found[name].shape)}, but {list(shape)} by "
                            f"its config")  # fmt: skip


def check_same_config(config_file: Path, config: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Refuse a pipeline's second network that is not of the first one's kind.

    Raises:
        UserError: ``teacher.path: ...``: a value of their configs differs.
    """
    for key in sorted({*config, *first}):
        if not key.startswith("_") and config.get(key) != first.get(key):
            raise UserError(f"teacher.path: {config_file} has {key} {config.get(key)!r}, but the first transformer "
                            f"has {first.get(key)!r}; the two must be of one config")  # fmt: skip


def meta_network(config_file: Path, kind: Any) -> Any:
    """Build the network of a config without memory for its weights.

    Raises:
        UserError: ``teacher.path: ...``: the config is not one of it, or asks for a quantized one.
    """
    from accelerate import init_empty_weights

    config = read_json(config_file)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "some kind")
        raise UserError(f"teacher.path: {config_file} has a quantization_config ({method}); a teacher's weights are "
                        f"float32, bfloat16 or float16: take the model as it was before it was quantized; "
                        f"teacher.quantization does that where it scores")  # fmt: skip
    try:
        with init_empty_weights():
            return kind.from_config(config)
    except Exception as error:  # whatever a constructor raises on values that are none
        raise UserError(f"teacher.path: {config_file} makes no {kind.__name__}: {one_line(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read one of a model's JSON files.

    Raises:
        UserError: ``teacher.path: ...``: it cannot be read.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            return tree
    except (OSError, ValueError):
        pass
    raise UserError(f"teacher.path: {file} is not a diffusers model's config")


def _indexed(index: Path, names: Iterable[str]) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"teacher.path: {index} is not an index of shards")
    files = sorted(set(shards.values()))
    missing = [name for name in files if name not in names]
    if missing or not files:
        raise UserError(f"teacher.path: {index.parent} lacks {len(missing)} of its {len(files)} shards, e.g. "
                        f"{missing[0] if missing else index.name}")  # fmt: skip
    return files


def _refuse_quantized(folder: Path, found: Mapping[str, TensorEntry]) -> None:
    scale = next((name for name in found if name.rpartition(".")[2] in SCALES), None)
    if scale is not None:
        raise UserError(f"teacher.path: {folder} is scaled fp8 ('{scale}'), whose scales would be lost; take the "
                        f"model in bfloat16 or float32")  # fmt: skip
    other = next(((name, entry.dtype) for name, entry in found.items() if entry.dtype not in FLOATS), None)
    if other is not None:
        raise UserError(f"teacher.path: '{other[0]}' in {folder} is of {other[1]}, a quantized format; take the model "
                        f"in bfloat16, float16 or float32")  # fmt: skip


def _prefix(found: Iterable[str], expected: Iterable[str]) -> str:
    """Return what stands before the network's own names in all of a file's, if anything does."""
    found, expected = list(found), list(expected)
    if not expected:
        return ""
    longest = max(expected, key=len)  # the end of no other name
    prefix = next((name.removesuffix(longest) for name in found if name.endswith(f".{longest}")), "")
    return prefix if prefix and all(name.startswith(prefix) for name in found) else ""


def _instead(unknown: Sequence[str]) -> str:
    return f", and has {len(unknown)} others, e.g. '{unknown[0]}'" if unknown else ""


def variant_of(folder: Path, variant: str) -> str | None:
    """Return the variant as diffusers takes it for another part of the pipeline: None where that part has none."""
    there = variant and folder.is_dir() and any(f".{variant}." in name or f".{variant}-" in name
                                                for name in os.listdir(folder))  # fmt: skip
    return variant if there else None
