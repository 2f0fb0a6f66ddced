"""Flux.2 klein: diffusers' Flux2Transformer2DModel behind the protocol."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.config_files import read_config
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.flux import picture_ids
from raydmd.models.diffusers.flux2_autoencoder import Flux2Autoencoder
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.sampler_grid import SamplerGrid, sampler_grid


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the shift's logarithm as Flux.2 has it, by the tokens and by the steps.

    It is `compute_empirical_mu` of diffusers' pipeline: a line in the tokens for 200 steps, another for 10, and a line
    in the steps between and beyond them; above 4300 tokens that of 200 steps alone.
    """
    at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    if tokens > 4300:
        return at_200
    return at_200 + (at_200 - at_10) / 190.0 * (steps - 200)


class Flux2KleinDenoiser(PretrainedDenoiser):
    """Takes [B, C, H, W], a token each place; gives the network t itself (its timestep / 1000)."""

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents``, given ``prompt_embeds`` [B, L, D]."""
        dtype, device = self.dtype, latents.device
        embeds = conditions["prompt_embeds"].to(dtype)
        tokens = self.network(
            hidden_states=latents.flatten(2).transpose(1, 2).to(dtype),
            timestep=t.to(torch.float32),
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=F.pad(torch.arange(embeds.shape[1], device=device)[:, None], (3, 0)),
            img_ids=F.pad(picture_ids(latents.shape[-2], latents.shape[-1], device), (0, 1)),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(latents.shape).to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the blocks of two streams, then those of one."""
        blocks = [*self.network.transformer_blocks, *self.network.single_transformer_blocks]
        return {f"blocks.{number}": block for number, block in enumerate(blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the picture's tokens along height and width."""
        return self.network.inner_dim, *latent_shape[-2:]

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the picture's tokens: the second of two outputs, or of one stream the last."""
        tokens = output[1] if isinstance(output, tuple) else output[:, -shape[1] * shape[2] :]
        return super().feature_map(tokens, shape)


class Flux2KleinFamily(PretrainedFamily):
    """Flux.2 klein, by prompts encoded beforehand, or by text where the teacher's text encoder is there.

    Columns: ``prompt_embeds`` [L, D] (three layers of Qwen3 side by side, 512 tokens) and the null prompt's
    ``negative_prompt_embeds``, of the same shape: the network sees the padding.

    Latents are as the network has them: the VAE's 32 channels in patches of 2 x 2, normed by its batch norm's
    statistics. The default ``latent_shape`` is of 1024 x 1024 pixels.

    The teacher is a base model (FLUX.2-klein-base), guided by ``teacher.guidance_scale``. Of the step-distilled ones
    (``is_distilled`` in model_index.json) the pipeline ignores guidance: another scale than 1 is refused.
    """

    name: ClassVar[str] = "flux2_klein"
    pipeline_class: ClassVar[str] = "Flux2KleinPipeline"
    network_class: ClassVar[str] = "Flux2Transformer2DModel"
    denoiser = Flux2KleinDenoiser
    autoencoder = Flux2Autoencoder
    widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "joint_attention_dim"}
    defaults: ClassVar[Mapping[str, Any]] = {**PretrainedFamily.defaults, "latent_shape": [128, 64, 64]}
    condition_columns = ["prompt_embeds", "negative_prompt_embeds"]

    @cached_property
    def lora_targets(self) -> list[str]:  # type: ignore[override]
        """The linear layers of both kinds of blocks; ``to_out`` is one of one stream only, and a list of two's."""
        singles = self.network_config.get("num_single_layers", 48)
        return [
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
            "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(singles)),
        ]  # fmt: skip

    @cached_property
    def patches(self) -> tuple[int, int, int]:
        """Latents of a token: one."""
        return 1, 1, 1

    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return the null prompt in the prompt's place.

        Raises:
            UserError: the prompts came without it, or the teacher is a step-distilled one.
        """
        if self.path is not None and (read_config(self._root(), "", "model_index.json") or {}).get("is_distilled"):
            raise UserError(f"teacher.guidance_scale: '{self.path}' is step-distilled (is_distilled in its "
                            f"model_index.json) and is not guided; use 1, or a base model")  # fmt: skip
        return super().unconditional(conditions)

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the column, of 512 tokens."""
        embeds, _ = pipeline.encode_prompt(prompts)
        return {"prompt_embeds": embeds.float().cpu().numpy()}

    def _read_grid(self, config: Mapping[str, Any]) -> SamplerGrid:
        """Read the law; the pipeline has one of its own for mu."""
        return sampler_grid(config, sigmas_given=not config.get("use_flow_sigmas"), mu=empirical_mu)

    def _check_latent_shape(self) -> None:
        if len(self.latent_shape) != 3:
            raise UserError(f"teacher.options.latent_shape: [C, H, W], not {list(self.latent_shape)}")

    def _check_config(self, config: Any) -> None:
        takes, gives = config.in_channels, config.out_channels or config.in_channels
        if config.guidance_embeds:
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes a guidance scale (guidance_embeds, "
                            f"as FLUX.2 dev's); family '{self.name}' takes klein's, which takes none")  # fmt: skip
        if takes != gives or config.patch_size != 1:
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes {takes} channels and gives {gives} "
                            f"in patches of {config.patch_size}; family '{self.name}' takes one that gives as many as "
                            f"it takes, in patches of 1")  # fmt: skip
        if takes != self.latent_shape[0]:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {takes} channels, not "
                            f"{self.latent_shape[0]} (those of the VAE's patches)")  # fmt: skip

    def stepped_latents(self, latents: Tensor) -> Tensor:
        """Return tokens [B, N, C]: the pipeline takes latents as they are, and packs them itself."""
        return latents.flatten(2).transpose(1, 2)
