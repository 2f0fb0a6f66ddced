"""Tiny CogVideoXs: 5b with rotary embeddings, 2b with sines and cosines, 1.5 with patches of two frames."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor

from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH = 16


class TinyCogVideoX(TinyModel):
    """CogVideoX-5b's structure; sampled by DDIM, whose first step draws no noise, at 2b's shift of the SNR."""

    family = "cogvideox"
    options = {"latent_shape": [4, 3, 8, 6]}
    structure: ClassVar[Mapping[str, Any]] = {"use_rotary_positional_embeddings": True}
    sampler: ClassVar[Mapping[str, Any]] = {
        "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 3.0,
    }  # fmt: skip

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "transformer": CogVideoXTransformer3DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
                text_embed_dim=WIDTH, num_layers=2, sample_frames=9, max_text_seq_length=self.tokens,
                **{"sample_width": 10, "sample_height": 6, **self.structure},
            ),
            "vae": AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
                down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            ),
            "scheduler": CogVideoXDDIMScheduler(clip_sample=False, prediction_type="v_prediction", **self.sampler),
        }  # fmt: skip

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.cogvideox(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
        }

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call CogVideoXPipeline on latents whose frames come before their channels."""
        pipeline = CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=AutoencoderKLCogVideoX.from_pretrained(folder / "vae"),
            scheduler=CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler"),
            transformer=CogVideoXTransformer3DModel.from_pretrained(folder / "transformer"),
        )  # fmt: skip
        frames, height, width = latents.shape[2:]
        made = FirstStep().of(
            pipeline, latents=latents.transpose(1, 2), height=8 * height, width=8 * width,
            num_frames=4 * (frames - 1) + 1, guidance_scale=guidance_scale, num_inference_steps=steps,
            **{name: torch.from_numpy(column) for name, column in rows.items()},
        )  # fmt: skip
        return made.transpose(1, 2)


class TinyCogVideoX2b(TinyCogVideoX):
    """CogVideoX-2b's structure, sampled from where not all of the signal is gone."""

    name = "cogvideox_2b"
    structure = {}
    sampler = {"rescale_betas_zero_snr": False, "timestep_spacing": "leading", "snr_shift_scale": 1.0}


class TinyCogVideoX15(TinyCogVideoX):
    """CogVideoX 1.5's structure."""

    name = "cogvideox_15"
    options = {"latent_shape": [4, 4, 8, 6]}
    structure = {
        "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "sample_height": 10,
    }  # fmt: skip
