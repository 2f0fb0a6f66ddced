"""Tiny models of every family, by its name: for tests and for benchmarks/families.py."""

from collections.abc import Mapping

from tiny_models.base import TinyModel as TinyModel
from tiny_models.edm import TinyEDM
from tiny_models.flux import TinyFlux
from tiny_models.flux2_klein import TinyFlux2Klein
from tiny_models.qwen_image import TinyQwenImage
from tiny_models.sd3 import TinySD3
from tiny_models.sdxl import TinySDXL
from tiny_models.stable_diffusion import TinyStableDiffusion
from tiny_models.wan import TinyWan
from tiny_models.z_image import TinyZImage

TINY_MODELS: Mapping[str, TinyModel] = {
    model.family: model
    for model in (
        TinyQwenImage(), TinyWan(), TinySD3(), TinyFlux(), TinyFlux2Klein(), TinyZImage(), TinySDXL(),
        TinyStableDiffusion(), TinyEDM(),
    )
}  # fmt: skip
