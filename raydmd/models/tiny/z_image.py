"""A tiny Z-Image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH = 16


class TinyZImage(TinyModel):
    """Its scheduler is Z-Image-Turbo's own."""

    family = "z_image"
    options = {"latent_shape": [4, 8, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts; the two tokens of padding are zeros in a new network, and drawn here."""
        network: Any = ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
        )  # fmt: skip
        torch.nn.init.normal_(network.x_pad_token)
        torch.nn.init.normal_(network.cap_pad_token)
        return {
            "transformer": network,
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.3611,
                shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.z_image(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts of `tokens` tokens, one of them shorter and padded, and null prompts of two fewer."""
        mask = np.ones((count, self.tokens), dtype=np.int64)
        mask[0, -2:] = 0
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens - 2, WIDTH),
            "negative_prompt_embeds_mask": np.ones((count, self.tokens - 2), dtype=np.int64),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call ZImagePipeline on lists of prompts; its scale is one less than u + w (c - u)'s."""
        pipeline: Any = ZImagePipeline(
            transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=None, tokenizer=None,
        )  # fmt: skip

        def prompts(name: str) -> list[Tensor]:
            kept = zip(rows[name], rows[f"{name}_mask"].astype(bool), strict=True)
            return [torch.from_numpy(embeds[real]) for embeds, real in kept]

        factor = pipeline.vae_scale_factor
        return FirstStep().of(
            pipeline, latents=latents, height=factor * latents.shape[2], width=factor * latents.shape[3],
            guidance_scale=guidance_scale - 1.0, num_inference_steps=steps, prompt_embeds=prompts("prompt_embeds"),
            negative_prompt_embeds=prompts("negative_prompt_embeds"),
        )  # fmt: skip
