"""A tiny SDXL."""

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, as_tensors, normal_rows, to_variance_preserving
from raydmd.models.tiny.clip_encoders import clip_pipeline

WIDTH, POOLED, SIZE = 16, 12, 8


class TinySDXL(TinyModel):
    """SDXL with the scheduler of its own: Euler's method on timesteps from 981 on, noise predicted."""

    family = "sdxl"
    options = {"latent_shape": [4, 4, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "unet": UNet2DConditionModel(
                block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=(1, 2),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=WIDTH,
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=SIZE,
                projection_class_embeddings_input_dim=POOLED + 6 * SIZE,
            ),
            "vae": tiny_autoencoder(scaling_factor=0.13025),
            "scheduler": EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading",
                steps_offset=1,
            ),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return clip_pipeline(6, (WIDTH - 6, POOLED))

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "pooled_prompt_embeds": normal_rows(draw, count, POOLED),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_pooled_prompt_embeds": normal_rows(draw, count, POOLED),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call StableDiffusionXLPipeline, which scales what it is given to the variance-exploding process."""
        pipeline: Any = StableDiffusionXLPipeline(
            scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"), text_encoder=None, tokenizer=None,
            vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder_2=None, tokenizer_2=None,
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"), add_watermarker=False,
        )  # fmt: skip
        height, width = (8 * side for side in latents.shape[-2:])
        made = FirstStep().of(
            pipeline, latents=latents, height=height, width=width, guidance_scale=guidance_scale,
            num_inference_steps=steps, **as_tensors(rows),
        )  # fmt: skip
        return to_variance_preserving(made, pipeline.scheduler.sigmas[1])


def tiny_autoencoder(**settings: Any) -> AutoencoderKL:
    """Return Stable Diffusion's VAE, of few channels."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, **settings,
    )  # fmt: skip
