"""A tiny Qwen-Image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH = 16


class TinyQwenImage(TinyModel):
    """191 thousand parameters; its scheduler is Qwen-Image's own."""

    family = "qwen_image"
    options = {"latent_shape": [4, 1, 8, 6]}

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "transformer": QwenImageTransformer2DModel(
                patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=3, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
            ),
            "vae": AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1],
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
                max_image_seq_len=8192, shift_terminal=0.02,
            ),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.qwen_image(WIDTH)

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
        """Call QwenImagePipeline on packed latents."""
        pipeline: Any = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"), text_encoder=None, tokenizer=None,
            transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
        )  # fmt: skip
        batch, channels, _, height, width = latents.shape
        packed = FirstStep().of(
            pipeline, latents=pipeline._pack_latents(latents, batch, channels, height, width), height=8 * height,
            width=8 * width, true_cfg_scale=guidance_scale, num_inference_steps=steps,
            **{name: torch.from_numpy(column) for name, column in rows.items()},
        )  # fmt: skip
        return pipeline._unpack_latents(packed, 8 * height, 8 * width, 8)
