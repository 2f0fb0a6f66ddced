"""A tiny Flux.2 klein."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor

from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH = 24  # three layers of 8


class TinyFlux2Klein(TinyModel):
    """A block of two streams and two of one; its VAE's statistics are not those of a new one."""

    family = "flux2_klein"
    options = {"latent_shape": [16, 4, 3]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        vae: Any = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
        )  # fmt: skip
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        return {
            "transformer": Flux2Transformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            "vae": vae,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.flux2_klein(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call Flux2KleinPipeline, whose latents while it runs are tokens."""
        pipeline: Any = Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel.from_pretrained(folder / "transformer"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"), text_encoder=None, tokenizer=None,
        )  # fmt: skip
        factor = 2 * pipeline.vae_scale_factor
        tokens = FirstStep().of(
            pipeline, latents=latents, height=factor * latents.shape[2], width=factor * latents.shape[3],
            guidance_scale=guidance_scale, num_inference_steps=steps,
            **{name: torch.from_numpy(column) for name, column in rows.items()},
        )  # fmt: skip
        return tokens.transpose(1, 2).reshape(latents.shape)
