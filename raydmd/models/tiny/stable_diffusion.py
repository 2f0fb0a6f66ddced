"""A tiny Stable Diffusion."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from raydmd.models.diffusers.config_files import read_config
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, as_tensors, normal_rows, to_variance_preserving
from raydmd.models.tiny.clip_encoders import clip_pipeline
from raydmd.models.tiny.sdxl import tiny_autoencoder

WIDTH = 16
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


class TinyStableDiffusion(TinyModel):
    """Stable Diffusion 2.1, as its picture of 768 pixels: DDIM, v predicted."""

    family = "stable_diffusion"
    options = {"latent_shape": [4, 4, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "unet": UNet2DConditionModel(
                block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=WIDTH,
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            "vae": tiny_autoencoder(),
            "scheduler": DDIMScheduler(
                **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
            ),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return clip_pipeline(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call StableDiffusionPipeline with the scheduler that lies in the folder."""
        kind = getattr(diffusers, (read_config(folder, "scheduler", "scheduler_config.json") or {})["_class_name"])
        pipeline: Any = StableDiffusionPipeline(
            scheduler=kind.from_pretrained(folder / "scheduler"), vae=AutoencoderKL.from_pretrained(folder / "vae"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"), text_encoder=None, tokenizer=None,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        exploding = "Euler" in kind.__name__
        if exploding:  # of its own scale, so that the pipeline begins where it is told to
            pipeline.scheduler.set_timesteps(steps)
            sigma = pipeline.scheduler.sigmas[0]
            latents = latents * (1.0 + sigma**2).sqrt() / pipeline.scheduler.init_noise_sigma
        height, width = (8 * side for side in latents.shape[-2:])
        made = FirstStep().of(
            pipeline, latents=latents, height=height, width=width, guidance_scale=guidance_scale,
            num_inference_steps=steps, **as_tensors(rows),
        )  # fmt: skip
        return to_variance_preserving(made, pipeline.scheduler.sigmas[1]) if exploding else made


class TinyStableDiffusion15(TinyStableDiffusion):
    """Stable Diffusion 1.5: PNDM, noise predicted."""

    name = "sd15"

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        return {**super().parts(), "scheduler": scheduler}
