"""Tiny Wans: 2.1's text to video, 2.2's two transformers, 2.2's image to video."""

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

from raydmd.models.diffusers.wan import WanFamily
from raydmd.models.tiny import text_encoders
from raydmd.models.tiny.base import FirstStep, Rows, TinyModel, normal_rows

WIDTH = 16


class TinyWan(TinyModel):
    """Wan 2.1's text to video, sampled by Euler's method, whose timesteps are not rounded as UniPC's are."""

    family = "wan"
    options = {"latent_shape": [4, 3, 8, 6]}
    image_channels = 0

    def network(self) -> WanTransformer3DModel:
        """Make a transformer."""
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4 + self.image_channels,
            out_channels=4, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip

    def vae(self) -> Any:
        """Make a VAE."""
        return AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1],
        )  # fmt: skip

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {
            "transformer": self.network(),
            "vae": self.vae(),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        }

    def encoders(self) -> Any:
        """Make them."""
        return text_encoders.wan(WIDTH)

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts and null prompts."""
        return {
            "prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
            "negative_prompt_embeds": normal_rows(draw, count, self.tokens, WIDTH),
        }

    def pipeline(self, folder: Path) -> Any:
        """Return diffusers' pipeline of `save`'s folder, without what encodes prompts."""
        return WanPipeline(tokenizer=None, text_encoder=None, **self.loaded(folder))

    def loaded(self, folder: Path) -> dict[str, Any]:
        """Load the parts."""
        return {
            "vae": AutoencoderKLWan.from_pretrained(folder / "vae"),
            "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            "transformer": WanTransformer3DModel.from_pretrained(folder / "transformer"),
        }

    def call(self, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        frames, height, width = latents.shape[2:]
        return {
            "latents": latents, "height": 8 * height, "width": 8 * width, "num_frames": 4 * (frames - 1) + 1,
            "guidance_scale": guidance_scale, "num_inference_steps": steps,
            **{name: torch.from_numpy(rows[name]) for name in ("prompt_embeds", "negative_prompt_embeds")},
        }  # fmt: skip

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call the pipeline."""
        return FirstStep().of(self.pipeline(folder), **self.call(rows, latents, guidance_scale, steps))


class TinyWan22(TinyWan):
    """Wan 2.2's text to video, A14B: two transformers that change over at 0.875."""

    name = "wan22"
    boundary_ratio = 0.875

    def parts(self) -> dict[str, Any]:
        """Make the parts."""
        return {**super().parts(), "transformer_2": self.network()}

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the folder and its model_index.json, which says where the second transformer takes over."""
        super().save(folder, seed)
        self.pipeline(folder).save_config(folder)
        return folder

    def loaded(self, folder: Path) -> dict[str, Any]:
        """Load the parts."""
        second = WanTransformer3DModel.from_pretrained(folder / "transformer_2")
        return {**super().loaded(folder), "transformer_2": second, "boundary_ratio": self.boundary_ratio}


class TinyWanImageToVideo(TinyWan):
    """Wan 2.2's image to video, with one transformer: the first frame comes as further channels of the latents."""

    name = "wan_i2v"
    image_channels = 8
    options = {**TinyWan.options, "image_channels": image_channels}

    @cached_property
    def encoder(self) -> WanFamily:
        """The family with nothing but its VAE, the same in every folder."""
        with TemporaryDirectory() as folder:
            self.vae().save_pretrained(Path(folder) / "vae")
            family = WanFamily(folder, self.options)
            family.encode_first_frames(torch.zeros(1, 3, 64, 48))  # loads it
        return family

    def vae(self) -> Any:
        """Make the VAE, whatever the seed of the rest."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return super().vae()

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw prompts, null prompts and first frames, of which only the encoded ones are the family's."""
        pictures = draw.uniform(-1.0, 1.0, (count, 3, 64, 48)).astype(np.float32)
        image = self.encoder.encode_first_frames(torch.from_numpy(pictures)).numpy()
        return {**super().columns(count, draw), "image_latents": image, "first_frame": pictures}

    def pipeline(self, folder: Path) -> Any:
        """Return diffusers' pipeline."""
        return WanImageToVideoPipeline(tokenizer=None, text_encoder=None, **self.loaded(folder))

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor:
        """Call the pipeline, which takes one picture, for one sample after the other."""
        made, pipeline = [], self.pipeline(folder)
        for row in range(len(latents)):
            each = {name: column[row : row + 1] for name, column in rows.items()}
            call = self.call(each, latents[row : row + 1], guidance_scale, steps)
            picture = torch.from_numpy(each["first_frame"]) / 2 + 0.5
            made.append(FirstStep().of(pipeline, image=picture, **call))
        return torch.cat(made)


class TinyWan22ImageToVideo(TinyWanImageToVideo, TinyWan22):
    """Wan 2.2's image to video, A14B: both transformers, that change over at 0.9."""

    name = "wan22_i2v"
    boundary_ratio = 0.9
