"""Tiny models of every family, by its name or its variant's: for tests and for benchmarks/families.py."""

from collections.abc import Mapping

from tiny_models.base import TinyModel as TinyModel
from tiny_models.cogvideox import TinyCogVideoX
from tiny_models.qwen_image import TinyQwenImage
from tiny_models.wan import TinyWan, TinyWan22, TinyWanImageToVideo

TINY_MODELS: Mapping[str, TinyModel] = {
    model.name: model for model in (TinyQwenImage(), TinyWan(), TinyWan22(), TinyWanImageToVideo(), TinyCogVideoX())
}  # fmt: skip
