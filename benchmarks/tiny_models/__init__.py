"""Tiny models of every family, by its name: for tests and for benchmarks/families.py."""

from collections.abc import Mapping

from tiny_models.base import TinyModel as TinyModel
from tiny_models.edm import TinyEDM
from tiny_models.qwen_image import TinyQwenImage
from tiny_models.sdxl import TinySDXL
from tiny_models.stable_diffusion import TinyStableDiffusion
from tiny_models.wan import TinyWan

TINY_MODELS: Mapping[str, TinyModel] = {
    model.family: model for model in (TinyQwenImage(), TinyWan(), TinySDXL(), TinyStableDiffusion(), TinyEDM())
}  # fmt: skip
