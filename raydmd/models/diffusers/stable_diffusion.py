"""Stable Diffusion 1 and 2 (Rombach et al. 2022): their UNet, and one text encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from raydmd.models.diffusers.discrete_grid import DiscreteGrid
from raydmd.models.diffusers.unet import UNetDenoiser, UNetFamily, array


class StableDiffusionFamily(UNetFamily):
    """Stable Diffusion 1.x and 2.x, by prompts encoded beforehand, or by text where the text encoder is there.

    What the UNet predicts (eps, or v as 2.1's of 768 pixels), its scheduler_config.json says. Columns:
    ``prompt_embeds`` [L, D] (77 tokens) and ``negative_prompt_embeds`` [L, D]. The default ``latent_shape`` is of
    512 x 512 pixels.
    """

    name: ClassVar[str] = "stable_diffusion"
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    denoiser = UNetDenoiser
    levels: ClassVar[int] = 4
    addition: ClassVar[str | None] = None
    process: ClassVar[Mapping[str, Any]] = {
        "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    }  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {**UNetFamily.defaults, "latent_shape": [4, 64, 64]}
    condition_columns = ["prompt_embeds", "negative_prompt_embeds"]

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": array(embeds)}

    def _read_grid(self, config: Mapping[str, Any]) -> DiscreteGrid:
        """Read the law of the timesteps as StableDiffusionPipeline runs its scheduler, whatever the config says."""
        return super()._read_grid({**config, "steps_offset": 1, "clip_sample": False})
