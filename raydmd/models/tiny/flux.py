"""A tiny Flux.1 dev."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH, POOLED = 16, 12
GUIDANCE = 3.5
"""What the network is told: the family's default."""


class TinyFlux(TinyModel):
    """Its scheduler is Flux.1 dev's own; a block of two streams and one of one."""

    family = "flux"
    options = {"latent_shape": [4, 8, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "transformer": FluxTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.3611,
                shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.flux(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "pooled_prompt_embeds": normal_rows(draw, count, POOLED),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_pooled_prompt_embeds": normal_rows(draw, count, POOLED),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call FluxPipeline on packed latents, the scale as ``true_cfg_scale``."""
        return self.embedded_step(folder, rows, latents, guidance_scale, steps, GUIDANCE)

    def embedded_step(
        self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int, embedded: float
    ) -> Tensor:
        """Call the pipeline as `first_step`, with another scale for the network's input."""
        pipeline: Any = FluxPipeline(
            transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        )  # fmt: skip
        batch, channels, height, width = latents.shape
        factor = pipeline.vae_scale_factor
        packed = FirstStep().of(
            pipeline, latents=pipeline._pack_latents(latents, batch, channels, height, width), height=factor * height,
            width=factor * width, true_cfg_scale=guidance_scale, guidance_scale=embedded, num_inference_steps=steps,
            **{name: torch.from_numpy(column) for name, column in rows.items()},
        )  # fmt: skip
        return pipeline._unpack_latents(packed, factor * height, factor * width, factor)
