"""Loading diffusers' models and pipelines from a folder, with errors of one line."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raydmd.errors import UserError
from raydmd.models.base import one_line
from raydmd.models.diffusers.weight_files import variant_of

ENCODER = ("text_encoder*/*", "tokenizer*/*", "processor/*")
"""A pipeline's files that encode prompts."""
OTHERS = (
    "transformer", "transformer_2", "unet", "vae", "scheduler", "image_encoder", "image_processor",
    "feature_extractor", "safety_checker",
)  # fmt: skip
"""A pipeline's parts that do not."""


def load_model(class_name: str, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """Load a diffusers model.

    Args:
        class_name: diffusers' class.
        folder: of its config and weights.
        variant: of the weights' files; None: of none.
        dtype: of the weights.

    Raises:
        UserError: it cannot be loaded.
    """
    import diffusers

    try:
        kind = getattr(diffusers, class_name)
        return kind.from_pretrained(folder, torch_dtype=dtype, variant=variant, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"teacher.path: cannot load '{folder}': {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the libraries' progress bars and notes on their own arguments: the terminal is the command's."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_text_pipeline(
    class_name: str, root: Path, variant: str, dtype: torch.dtype, absent: Sequence[str] = ()
) -> Any:
    """Load a pipeline with nothing in it but what encodes prompts.

    Args:
        class_name: diffusers' class.
        root: the pipeline's folder.
        variant: of the weights' files, of those parts that have it; empty: of none.
        dtype: of the text encoders' weights.
        absent: text encoders that are not there, and left out with their tokenizers.

    Raises:
        UserError: it cannot be loaded.
    """
    import diffusers

    kind = getattr(diffusers, class_name)
    without: dict[str, Any] = {name: None for name in OTHERS if name in inspect.signature(kind).parameters}
    without |= {name: None for part in absent for name in (part, part.replace("text_encoder", "tokenizer"))}
    without["variant"] = variant_of(root / "text_encoder", variant)
    try:
        with _quiet():
            pipeline = kind.from_pretrained(root, torch_dtype=dtype, use_safetensors=True, **without)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"teacher.path: cannot load the text encoder of '{root}': {one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
