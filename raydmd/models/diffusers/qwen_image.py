"""Qwen-Image: diffusers' QwenImageTransformer2DModel behind the protocol."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.autoencoder import QwenImageAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.packing import pack, unpack
from raydmd.models.diffusers.pretrained import PretrainedFamily

BUCKET = 64
"""Tokens."""
TOKENS = 1024
"""Of a prompt, at most, besides its template's."""
POSITIONS = 4096
"""Of the rotary embedding, on either side of 0; the picture is centred, and the text follows on its diagonal."""


class QwenImageDenoiser(PretrainedDenoiser):
    """Takes [B, C, 1, H, W] or [B, C, H, W]; packs latents, and gives the network t itself (its timestep / 1000)."""

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents``, given ``prompt_embeds`` [B, L, D] and ``prompt_embeds_mask`` [B, L]."""
        patch, dtype = self.network.config.patch_size, self.dtype
        height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
        tokens = self.network(
            hidden_states=pack(latents, patch).to(dtype),
            timestep=t.to(torch.float32),
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
            img_shapes=[[(1, height, width)]] * latents.shape[0],
            return_dict=False,
        )[0]
        return unpack(tokens, latents.shape, patch).to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the transformer's blocks."""
        return {f"blocks.{number}": block for number, block in enumerate(self.network.transformer_blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the picture's tokens along height and width."""
        patch = self.network.config.patch_size
        return self.network.inner_dim, latent_shape[-2] // patch, latent_shape[-1] // patch

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the picture's tokens, the second of a block's two outputs."""
        return super().feature_map(output[1], shape)


class QwenImageFamily(PretrainedFamily):
    """Qwen-Image, by prompts encoded beforehand, or by text where the teacher's text encoder is there.

    Columns: ``prompt_embeds`` [L, D], ``prompt_embeds_mask`` [L], and the null prompt's ``negative_prompt_embeds``
    [M, D] and ``negative_prompt_embeds_mask`` [M]; the shorter is padded to the longer and masked.
    The default ``latent_shape`` is of 1328 x 1328 pixels.
    """

    name: ClassVar[str] = "qwen_image"
    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    network_class: ClassVar[str] = "QwenImageTransformer2DModel"
    denoiser = QwenImageDenoiser
    autoencoder = QwenImageAutoencoder
    widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "joint_attention_dim"}
    text_tokens = TOKENS
    gives_sigmas: ClassVar[bool] = True
    guidance_rescale = "norm"
    unguided: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 1.0}
    defaults: ClassVar[Mapping[str, Any]] = {
        **PretrainedFamily.defaults, "latent_shape": [16, 1, 166, 166], "negative_prompt": " ",
    }  # fmt: skip
    lora_targets = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    ]  # fmt: skip
    condition_columns = [
        "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask",
    ]  # fmt: skip

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the columns, padded to a whole number of `BUCKET` tokens: prompts of like length share batches."""
        embeds, mask = pipeline.encode_prompt(prompts)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask.cpu()
        extra = -embeds.shape[1] % BUCKET
        return {
            "prompt_embeds": F.pad(embeds.float().cpu(), (0, 0, 0, extra)).numpy(),
            "prompt_embeds_mask": F.pad(mask, (0, extra)).numpy(),
        }

    def _check_latent_shape(self) -> None:
        shape = self.latent_shape
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] != 1) or shape[-2] % 2 or shape[-1] % 2:
            raise UserError(f"teacher.options.latent_shape: [C, 1, H, W] or [C, H, W], H and W even, not {list(shape)}")

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the prompts' width and length against the transformer's; `check_teacher` has been called."""
        super().check_conditions(conditions)
        tokens, first = (
            conditions["prompt_embeds"].shape[1],
            max(self.latent_shape[-2:]) // self._config.patch_size // 2,
        )
        if first + tokens > POSITIONS:
            raise UserError(f"prompts: {tokens} tokens do not go with latent_shape {list(self.latent_shape)}: the "
                            f"teacher has {POSITIONS} positions, and the text's begin at {first}")  # fmt: skip

    def _check_config(self, config: Any) -> None:
        channels, patch = config.in_channels, config.patch_size
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise UserError(f"teacher.path: the transformer in '{self.path}' has {key} (a guidance-distilled, edit "
                                f"or layered one); family 'qwen_image' takes text to image's")  # fmt: skip
        if channels != patch**2 * (config.out_channels or channels):
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes {channels} channels and gives "
                            f"{config.out_channels} a latent; by its patches of {patch} it would take "
                            f"{patch**2} times as many as it gives")  # fmt: skip
        if channels != patch**2 * self.latent_shape[0]:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {channels // patch**2} channels, "
                            f"not {self.latent_shape[0]}")  # fmt: skip
        if any(size % patch for size in self.latent_shape[-2:]):
            raise UserError(f"teacher.options.latent_shape: {list(self.latent_shape[-2:])} is not divisible by the "
                            f"teacher's patches {patch}")  # fmt: skip
        patches = [size // patch for size in self.latent_shape[-2:]]
        if max(patches) > 2 * POSITIONS:
            raise UserError(f"teacher.options.latent_shape: {patches} patches along the sides, but the teacher has "
                            f"{2 * POSITIONS} positions along each")  # fmt: skip

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Return tokens [B, N, 4 C]."""
        return pack(latents)

    def original_layer(self, layer: str) -> str:
        """Return the name as it is: diffusers' names are the model's own."""
        return layer
