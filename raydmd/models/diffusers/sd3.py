"""Stable Diffusion 3 Medium, 3.5 Large and 3.5 Medium: diffusers' SD3Transformer2DModel behind the protocol."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.autoencoder import ImageAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.pretrained import PretrainedFamily

TIMESTEPS = 1000.0
"""The network counts time from 0 to 1000."""


class SD3Denoiser(PretrainedDenoiser):
    """Takes [B, C, H, W]; gives the network 1000 t (Esser et al. 2024, arXiv 2403.03206)."""

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents``, given ``prompt_embeds`` [B, L, D] and ``pooled_prompt_embeds`` [B, P]."""
        dtype = self.dtype
        flow = self.network(
            hidden_states=latents.to(dtype),
            timestep=TIMESTEPS * t.to(torch.float32),
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            pooled_projections=conditions["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return flow.to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the joint blocks of text and picture."""
        return {f"blocks.{number}": block for number, block in enumerate(self.network.transformer_blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the picture's tokens along height and width."""
        patch = self.network.config.patch_size
        return self.network.inner_dim, latent_shape[-2] // patch, latent_shape[-1] // patch

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the picture's tokens, the second of a block's two outputs; the first is None in the last block."""
        return super().feature_map(output[1], shape)


class SD3Family(PretrainedFamily):
    """Stable Diffusion 3 and 3.5, by prompts encoded beforehand, or by text where the teacher's encoders are there.

    Columns: ``prompt_embeds`` [L, D] (77 tokens of the two CLIPs, then 256 of T5, 4096 wide), ``pooled_prompt_embeds``
    [P] (2048), and the null prompt's ``negative_prompt_embeds`` and ``negative_pooled_prompt_embeds``, of the same
    shapes: the network sees the padding. A teacher without T5 (``text_encoder_3``) has zeros in its tokens' place, as
    the pipeline has.

    3.5's normed queries and keys, and Medium's second attention, are in the network's config. Guidance by skipped
    layers, which 3.5 Medium's authors recommend for its own sampling, is not in the teacher's score.
    The default ``latent_shape`` is of 1024 x 1024 pixels.
    """

    name: ClassVar[str] = "sd3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    network_class: ClassVar[str] = "SD3Transformer2DModel"
    denoiser = SD3Denoiser
    autoencoder = ImageAutoencoder
    widths: ClassVar[Mapping[str, str]] = {
        "prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim",
    }  # fmt: skip
    gives_mu: ClassVar[bool] = True
    optional_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    defaults: ClassVar[Mapping[str, Any]] = {**PretrainedFamily.defaults, "latent_shape": [16, 128, 128]}
    lora_targets = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ]  # fmt: skip
    condition_columns = [
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    ]  # fmt: skip

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the columns as `StableDiffusion3Pipeline.encode_prompt` has them, all three encoders on one text."""
        if pipeline.text_encoder_3 is None:  # its zeros are of the width that the network takes
            pipeline.transformer = SimpleNamespace(
                config=SimpleNamespace(joint_attention_dim=self.network_config.get("joint_attention_dim", 4096))
            )
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return {
            "prompt_embeds": embeds.float().cpu().numpy(),
            "pooled_prompt_embeds": pooled.float().cpu().numpy(),
        }

    def _check_latent_shape(self) -> None:
        if len(self.latent_shape) != 3:
            raise UserError(f"teacher.options.latent_shape: [C, H, W], not {list(self.latent_shape)}")

    def _check_config(self, config: Any) -> None:
        channels, sides, patch = self.latent_shape[0], list(self.latent_shape[1:]), config.patch_size
        out = config.in_channels if config.out_channels is None else config.out_channels
        if out != config.in_channels:
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes {config.in_channels} channels and "
                            f"gives {out} (another variant than text to image); family '{self.name}' takes one that "
                            f"gives as many as it takes")  # fmt: skip
        if config.in_channels != channels:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {config.in_channels} channels, "
                            f"not {channels}")  # fmt: skip
        if any(side % patch for side in sides):
            raise UserError(f"teacher.options.latent_shape: {sides} is not divisible by the teacher's patches {patch}")
        patches, positions = [side // patch for side in sides], config.pos_embed_max_size
        if max(patches) > positions:
            raise UserError(f"teacher.options.latent_shape: {patches} patches along the sides, but the teacher has "
                            f"{positions} positions along each")  # fmt: skip
