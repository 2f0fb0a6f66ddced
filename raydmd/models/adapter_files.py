"""What an expert's file says of its LoRA adapters, in the form that diffusers' loaders read."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from raydmd.errors import UserError
from raydmd.models.base import one_line

METADATA_KEY = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
COMPONENTS = ("transformer", "unet")  # what the names of a diffusers network's tensors begin with, as diffusers has it


@dataclass(frozen=True)
class Adapter:
    """The scale of an adapter's effect: alpha / rank B A."""

    rank: int
    alpha: float


def adapter_metadata(names: Iterable[str], rank: int, alpha: float, targets: Sequence[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file of adapters.

    It is what ``save_lora_weights(..., transformer_lora_adapter_metadata=LoraConfig.to_dict())`` writes (of a UNet,
    ``unet_lora_adapter_metadata``), as far as it is not PEFT's default. Without it diffusers takes alpha to be the
    rank.

    Args:
        names: of the file's tensors.
        rank: of the adapters.
        alpha: of the adapters.
        targets: endings of the names of the layers that have one (PEFT's ``target_modules``).
    """
    first = {_component(name) for name in names}
    prefix = f"{first.pop()}." if len(first) == 1 and first <= set(COMPONENTS) else ""
    said = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    return {
        "format": "pt",
        METADATA_KEY: json.dumps({f"{prefix}{key}": value for key, value in said.items()}, sort_keys=True),
    }


def read_adapter(file: Path) -> Adapter | None:
    """Return what a file says of its adapters; None where it says nothing, as those of older versions.

    Raises:
        UserError: the file cannot be read, or says what is no rank and alpha.
    """
    text = _metadata(file).get(METADATA_KEY)
    if text is None:
        return None
    try:
        said = {key.removeprefix(f"{_component(key)}."): value for key, value in json.loads(text).items()}
        return Adapter(int(said["r"]), float(said["lora_alpha"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: its {METADATA_KEY} is not a record with r and lora_alpha") from error


def check_adapter(file: Path, rank: int, alpha: float) -> None:
    """Refuse a file whose adapters have another rank or alpha than the recipe's.

    Raises:
        UserError: they differ, or the file cannot be read.
    """
    said = read_adapter(file)
    if said is not None and said != Adapter(rank, alpha):
        raise UserError(f"{file}: its adapters have rank {said.rank} and alpha {said.alpha:g}, but the run's recipe "
                        f"has method.experts.rank {rank} and alpha {alpha:g}")  # fmt: skip


def _component(name: str) -> str:
    """Return what the name begins with, of `COMPONENTS`; else nothing."""
    return next((component for component in COMPONENTS if name.startswith(f"{component}.")), "")


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not readable as a safetensors file: {one_line(error)}") from error
