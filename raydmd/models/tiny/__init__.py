"""Tiny models of every family, by its name or its variant's: for recipes in miniature, tests and benchmarks."""

from collections.abc import Mapping

from raydmd.models.tiny.base import TinyModel as TinyModel
from raydmd.models.tiny.cogvideox import TinyCogVideoX, TinyCogVideoX2b
from raydmd.models.tiny.edm import TinyEDM
from raydmd.models.tiny.flux import TinyFlux
from raydmd.models.tiny.flux2_klein import TinyFlux2Klein
from raydmd.models.tiny.qwen_image import TinyQwenImage
from raydmd.models.tiny.sd3 import TinySD3
from raydmd.models.tiny.sdxl import TinySDXL
from raydmd.models.tiny.stable_diffusion import TinyStableDiffusion, TinyStableDiffusion15
from raydmd.models.tiny.wan import TinyWan, TinyWan22, TinyWan22ImageToVideo, TinyWanImageToVideo
from raydmd.models.tiny.z_image import TinyZImage

TINY_MODELS: Mapping[str, TinyModel] = {
    model.name: model
    for model in (
        TinyQwenImage(), TinyWan(), TinyWan22(), TinyWanImageToVideo(), TinyCogVideoX(), TinySD3(), TinyFlux(),
        TinyFlux2Klein(), TinyZImage(), TinySDXL(), TinyStableDiffusion(), TinyEDM(),
    )
}  # fmt: skip

TINY_VARIANTS: Mapping[str, TinyModel] = {
    model.name: model for model in (TinyWan22ImageToVideo(), TinyCogVideoX2b(), TinyStableDiffusion15())
}
"""Further structures that recipes have in miniature (``teacher.tiny``)."""
