"""Stable Diffusion XL (Podell et al. 2023): its UNet, two text encoders, and a picture's size as a condition."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raydmd.diffusion.schedule import VariancePreserving
from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.unet import UNetDenoiser, UNetFamily, array

SIZES = 6
"""Numbers of ``time_ids``: the original size, the crop's corner and the target size, each height before width."""


class SDXLDenoiser(UNetDenoiser):
    """Adds the pooled embedding and the picture's size, uncropped (Podell et al. Sec. 2.2).

    Args:
        network: the UNet.
        schedule: the process whose steps it counts.
        spatial: pixels along a latent's side.
    """

    def __init__(self, network: nn.Module, schedule: VariancePreserving, spatial: int) -> None:
        super().__init__(network, schedule)
        self.spatial = spatial

    def added(self, latents: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """Return ``text_embeds`` [B, P] from ``pooled_prompt_embeds``, and ``time_ids`` [B, 6] of the latents' size."""
        height, width = (self.spatial * side for side in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=latents.device)
        pooled = conditions["pooled_prompt_embeds"].to(self.dtype)
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), -1)}


class SDXLFamily(UNetFamily):
    """SDXL's base model, by prompts encoded beforehand, or by text where the teacher's text encoders are there.

    Columns: ``prompt_embeds`` [L, D] (77 tokens of both encoders, side by side), ``pooled_prompt_embeds`` [P], and the
    null prompt's ``negative_prompt_embeds`` and ``negative_pooled_prompt_embeds``. An empty ``negative_prompt`` is
    zeros where the pipeline has ``force_zeros_for_empty_prompt``, as there. The default ``latent_shape`` is of
    1024 x 1024 pixels.
    """

    name: ClassVar[str] = "sdxl"
    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    denoiser = SDXLDenoiser
    levels: ClassVar[int] = 3
    addition: ClassVar[str | None] = "text_time"
    process: ClassVar[Mapping[str, Any]] = {
        "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012,
    }  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {**UNetFamily.defaults, "latent_shape": [4, 128, 128]}
    lora_targets = [*UNetFamily.lora_targets, "proj_in", "proj_out"]
    condition_columns = [
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    ]  # fmt: skip

    def _wrap(self, network: Any) -> PretrainedDenoiser:
        return SDXLDenoiser(network, self.schedule, self.vae.spatial)

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": array(embeds), "pooled_prompt_embeds": array(pooled)}

    def _encode_null(self, pipeline: Any) -> dict[str, np.ndarray]:
        rows = super()._encode_null(pipeline)
        if self.options["negative_prompt"] or not pipeline.config.force_zeros_for_empty_prompt:
            return rows
        return {name: np.zeros_like(row) for name, row in rows.items()}

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return the embeddings [B, L, D] and the pooled ones [B, P], and where given, the null prompt's."""
        conditions = super().conditions(rows)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            if name in rows and pooled not in rows:
                raise UserError(f"prompts: column '{name}' needs '{pooled}' beside it")
        return conditions

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the widths of the embeddings and of the pooled ones against the UNet's."""
        super().check_conditions(conditions)
        width, config = conditions["pooled_prompt_embeds"].shape[-1], self._config
        wanted = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        if width != wanted:
            raise UserError(f"prompts: column 'pooled_prompt_embeds' is of width {width}, but the teacher takes "
                            f"{wanted}")  # fmt: skip
