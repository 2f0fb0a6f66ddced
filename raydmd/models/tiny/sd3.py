"""A tiny Stable Diffusion 3.5 Medium: with normed queries and keys, and a second attention in its first block."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH, POOLED = 16, 12


class TinySD3(TinyModel):
    """Its scheduler is SD3's own."""

    family = "sd3"
    options = {"latent_shape": [4, 8, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "transformer": SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
                pooled_projection_dim=POOLED, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=1.5305,
                shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.sd3(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "pooled_prompt_embeds": normal_rows(draw, count, POOLED),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_pooled_prompt_embeds": normal_rows(draw, count, POOLED),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call StableDiffusion3Pipeline."""
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        pipeline: Any = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer"), vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            text_encoder=None, text_encoder_2=None, text_encoder_3=None,
            tokenizer=None, tokenizer_2=None, tokenizer_3=None,
        )  # fmt: skip
        factor = pipeline.vae_scale_factor
        return FirstStep().of(
            pipeline, latents=latents, height=factor * latents.shape[2], width=factor * latents.shape[3],
            guidance_scale=guidance_scale, num_inference_steps=steps,
            **{name: torch.from_numpy(column) for name, column in rows.items()},
        )  # fmt: skip
