"""A tiny Wan."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from tiny_models.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH = 16


class TinyWan(TinyModel):
    """Wan 2.1's text to video, sampled by Euler's method, whose timesteps are not rounded as UniPC's are."""

    family = "wan"
    options = {"latent_shape": [4, 3, 8, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "transformer": WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
            ),
            "vae": AutoencoderKLWan(
                base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1],
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        }  # fmt: skip

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call WanPipeline."""
        pipeline = WanPipeline(
            tokenizer=None, text_encoder=None, vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
        )  # fmt: skip
        frames, height, width = latents.shape[2:]
        return FirstStep().of(
            pipeline, latents=latents, height=8 * height, width=8 * width, num_frames=4 * (frames - 1) + 1,
            guidance_scale=guidance_scale, num_inference_steps=steps,
            **{name: torch.from_numpy(column) for name, column in rows.items()},
        )  # fmt: skip
