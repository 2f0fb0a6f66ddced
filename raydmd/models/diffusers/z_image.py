"""Z-Image: diffusers' ZImageTransformer2DModel behind the protocol."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.autoencoder import ImageAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.student_sampler import Inputs

PATCH = 2
"""Latents along a token's sides: the network's own default, and the pipeline gives it no other."""
MULTIPLE = 32
"""Tokens: the network pads a prompt to a multiple with a learnt token, and the picture's positions follow on."""


class ZImageDenoiser(PretrainedDenoiser):
    """Takes [B, C, H, W]; gives the network each sample by itself, its prompt without padding, and the time 1 - t.

    The network's time runs from noise (0) to data (1), and its prediction is data - noise: the flow with its sign
    turned.
    """

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents``, given ``prompt_embeds`` [B, L, D] and ``prompt_embeds_mask`` [B, L]."""
        embeds, mask = conditions["prompt_embeds"].to(self.dtype), conditions["prompt_embeds_mask"]
        velocities = self.network(
            list(latents.to(self.dtype)[:, :, None]),
            (1.0 - t).to(torch.float32),
            [prompt[real] for prompt, real in zip(embeds, mask, strict=True)],
            patch_size=PATCH,
            f_patch_size=1,
            return_dict=False,
        )[0]
        return -torch.stack(velocities)[:, :, 0].to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the blocks that see picture and text."""
        return {f"blocks.{number}": block for number, block in enumerate(self.network.layers)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the picture's tokens along height and width."""
        return self.network.dim, latent_shape[-2] // PATCH, latent_shape[-1] // PATCH

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the picture's tokens, a sequence's first; padding and the text follow."""
        return super().feature_map(output[:, : math.prod(shape[1:])], shape)


class ZImageFamily(PretrainedFamily):
    """Z-Image, by prompts encoded beforehand, or by text where the teacher's text encoder is there.

    Columns: ``prompt_embeds`` [L, D], ``prompt_embeds_mask`` [L], and the null prompt's ``negative_prompt_embeds``
    [M, D] and ``negative_prompt_embeds_mask`` [M]; the shorter is padded to the longer and masked, and the network
    sees neither. The default ``latent_shape`` is of 1024 x 1024 pixels.

    ``teacher.guidance_scale`` is w of u + w (c - u), as everywhere; the pipeline's ``guidance_scale`` is w - 1, since
    it computes c + scale (c - u). Z-Image-Turbo's own is 0, which is 1 here.
    """

    name: ClassVar[str] = "z_image"
    pipeline_class: ClassVar[str] = "ZImagePipeline"
    network_class: ClassVar[str] = "ZImageTransformer2DModel"
    denoiser = ZImageDenoiser
    autoencoder = ImageAutoencoder
    widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "cap_feat_dim"}
    patch: ClassVar[tuple[int, int, int]] = (1, PATCH, PATCH)
    gives_sigmas: ClassVar[bool] = True
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}
    defaults: ClassVar[Mapping[str, Any]] = {**PretrainedFamily.defaults, "latent_shape": [16, 128, 128]}
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    condition_columns = [
        "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask",
    ]  # fmt: skip

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return the columns as tensors; a prompt has at least one token."""
        conditions = super().conditions(rows)
        for name, mask in conditions.items():
            if name.endswith("_mask") and not mask.any(1).all():
                row = int((~mask.any(1)).nonzero()[0])
                raise UserError(f"prompts: column '{name}' has no token in row {row} of {len(mask)}")
        return conditions

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the prompts' width and length against the network's; `check_teacher` has been called."""
        super().check_conditions(conditions)
        tokens, positions = conditions["prompt_embeds"].shape[1], self._config.axes_lens[0]
        if -(-tokens // MULTIPLE) * MULTIPLE + 2 > positions:
            raise UserError(f"prompts: {tokens} tokens are too many: the teacher has {positions} positions for a "
                            f"prompt's, padded to a multiple of {MULTIPLE}, and a picture")  # fmt: skip

    def pipeline_inputs(self, conditions: Conditions) -> tuple[Conditions, Inputs]:
        """Return the prompts as the pipeline takes them: a list of embeddings without padding."""
        prompts = zip(conditions["prompt_embeds"], conditions["prompt_embeds_mask"], strict=True)
        return conditions, {"prompt_embeds": [embeds[mask.bool()] for embeds, mask in prompts]}

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the columns, padded to a whole number of `MULTIPLE` tokens: prompts of like length share batches."""
        found, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        length = -(-max(len(embeds) for embeds in found) // MULTIPLE) * MULTIPLE
        embeds = torch.stack([F.pad(each.float().cpu(), (0, 0, 0, length - len(each))) for each in found])
        mask = torch.stack([torch.arange(length) < len(each) for each in found])
        return {"prompt_embeds": embeds.numpy(), "prompt_embeds_mask": mask.long().numpy()}

    def _check_latent_shape(self) -> None:
        shape = self.latent_shape
        if len(shape) != 3 or shape[-2] % PATCH or shape[-1] % PATCH:
            raise UserError(f"teacher.options.latent_shape: [C, H, W], H and W even, not {list(shape)}")

    def _check_config(self, config: Any) -> None:
        channels, patches = self.latent_shape[0], [side // PATCH for side in self.latent_shape[1:]]
        if config.siglip_feat_dim is not None:
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes pictures' embeddings "
                            f"(siglip_feat_dim {config.siglip_feat_dim}, as Z-Image-Omni does), which family "
                            f"'{self.name}' does not give it")  # fmt: skip
        kinds = list(zip(config.all_patch_size, config.all_f_patch_size, strict=True))
        if (PATCH, 1) not in kinds:
            raise UserError(f"teacher.path: the transformer in '{self.path}' has patches {kinds} (sides, frames); "
                            f"family '{self.name}' takes one with {(PATCH, 1)}")  # fmt: skip
        if config.in_channels != channels:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {config.in_channels} channels, "
                            f"not {channels}")  # fmt: skip
        if any(count > most for count, most in zip(patches, config.axes_lens[1:], strict=True)):
            raise UserError(f"teacher.options.latent_shape: {patches} patches along the sides, but the teacher has "
                            f"{list(config.axes_lens[1:])} positions along them")  # fmt: skip
