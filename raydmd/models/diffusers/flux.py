"""Flux.1 dev and schnell: diffusers' FluxTransformer2DModel behind the protocol."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.autoencoder import ImageAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.packing import pack, unpack
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.sampler_grid import SamplerGrid, sampler_grid

PACK = 2
"""Latents along a token's sides: the pipeline packs them, while the network's own ``patch_size`` is 1."""


def picture_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return the positions [height * width, 3] of a picture's tokens: 0, row, column."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(torch.zeros(1, dtype=rows.dtype, device=device), rows, columns)


class FluxDenoiser(PretrainedDenoiser):
    """Takes [B, C, H, W]; packs latents, and gives the network t itself (its timestep / 1000).

    Args:
        network: FluxTransformer2DModel.
        guidance: what a network with ``guidance_embeds`` is told at every call; None of one without.
    """

    def __init__(self, network: nn.Module, guidance: float | None = None) -> None:
        super().__init__(network)
        self.guidance = guidance

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents``, given ``prompt_embeds`` [B, L, D] and ``pooled_prompt_embeds`` [B, P]."""
        dtype, device = self.dtype, latents.device
        embeds = conditions["prompt_embeds"].to(dtype)
        time = t.to(torch.float32)
        tokens = self.network(
            hidden_states=pack(latents, PACK).to(dtype),
            timestep=time,
            guidance=None if self.guidance is None else torch.full_like(time, self.guidance),
            encoder_hidden_states=embeds,
            pooled_projections=conditions["pooled_prompt_embeds"].to(dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
            img_ids=picture_ids(latents.shape[-2] // PACK, latents.shape[-1] // PACK, device),
            return_dict=False,
        )[0]
        return unpack(tokens, latents.shape, PACK).to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the blocks of two streams, then those of one."""
        blocks = [*self.network.transformer_blocks, *self.network.single_transformer_blocks]
        return {f"blocks.{number}": block for number, block in enumerate(blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the picture's tokens along height and width."""
        return self.network.inner_dim, latent_shape[-2] // PACK, latent_shape[-1] // PACK

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the picture's tokens, the second of a block's two outputs."""
        return super().feature_map(output[1], shape)


class FluxFamily(PretrainedFamily):
    """Flux.1, by prompts encoded beforehand, or by text where the teacher's text encoders are there.

    Columns: ``prompt_embeds`` [L, D] (T5's, 512 tokens, 4096 wide), ``pooled_prompt_embeds`` [P] (CLIP's, 768), and
    the null prompt's ``negative_prompt_embeds`` and ``negative_pooled_prompt_embeds``, of the same shapes: the network
    sees the padding. The default ``latent_shape`` is of 1024 x 1024 pixels.

    Guidance is of two kinds:

    - Flux.1 dev is guidance-distilled: its network takes a scale as an input, and has guided predictions for its
      outputs. ``embedded_guidance`` (the pipeline's ``guidance_scale``) is that input wherever the network runs: in the
      teacher, the fake score, the students and their samplers. So the teacher's score is that of the guided
      distribution of that scale, and at ``teacher.guidance_scale`` 1, its usual value here, a call is one pass and no
      null prompt is looked at (with ``null_prompt: false`` its columns are not asked for). The fake score and the
      students begin as that guided network, too, and are trained on under the same input, which is then only a
      constant: the fake score learns the students' own distribution, guided or not, so nothing is guided twice. A
      student is run with the scale that it was trained with.
    - ``teacher.guidance_scale`` above 1 is classifier-free guidance with the null prompt on top of that, as the
      pipeline's ``true_cfg_scale``. Of Flux.1 schnell, whose network takes no scale, it is the only kind.
    """

    name: ClassVar[str] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    network_class: ClassVar[str] = "FluxTransformer2DModel"
    denoiser = FluxDenoiser
    autoencoder = ImageAutoencoder
    widths: ClassVar[Mapping[str, str]] = {
        "prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim",
    }  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {
        **PretrainedFamily.defaults, "latent_shape": [16, 128, 128], "embedded_guidance": 3.5,
    }  # fmt: skip
    meanings: ClassVar[Mapping[str, str]] = {
        "embedded_guidance": "the scale that dev's network is told (the pipeline's guidance_scale)",
    }
    condition_columns = [
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    ]  # fmt: skip

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        scale = self.options["embedded_guidance"]
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not (0.0 <= scale < math.inf):
            raise UserError(f"teacher.options.embedded_guidance: a number from 0 on is needed, not {scale!r}")

    @cached_property
    def lora_targets(self) -> list[str]:  # type: ignore[override]
        """The linear layers of both kinds of blocks; ``proj_out`` is also the name of the network's last layer."""
        singles = self.network_config.get("num_single_layers", 38)
        return [
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
            "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
            *(f"single_transformer_blocks.{number}.proj_out" for number in range(singles)),
        ]  # fmt: skip

    @cached_property
    def patches(self) -> tuple[int, int, int]:
        """Latents of a token along frames, height and width: as the pipeline packs them."""
        return 1, PACK, PACK

    def _wrap(self, network: Any) -> FluxDenoiser:
        scale = float(self.options["embedded_guidance"])
        return FluxDenoiser(network, scale if network.config.guidance_embeds else None)

    @property
    def constant_inputs(self) -> Mapping[str, float]:
        """The embedded guidance, of a network that takes it."""
        given = {"embedded_guidance": float(self.options["embedded_guidance"])}
        return given if self.network_config.get("guidance_embeds") else {}

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the columns, of T5's 512 tokens."""
        embeds, pooled, _ = pipeline.encode_prompt(prompts)
        return {
            "prompt_embeds": embeds.float().cpu().numpy(),
            "pooled_prompt_embeds": pooled.float().cpu().numpy(),
        }

    def _read_grid(self, config: Mapping[str, Any]) -> SamplerGrid:
        """Read the law; the pipeline gives its scheduler sigmas, but for one of ``use_flow_sigmas``."""
        return sampler_grid(config, sigmas_given=not config.get("use_flow_sigmas"))

    def _check_latent_shape(self) -> None:
        shape = self.latent_shape
        if len(shape) != 3 or shape[-2] % PACK or shape[-1] % PACK:
            raise UserError(f"teacher.options.latent_shape: [C, H, W], H and W even, not {list(shape)}")

    def _check_config(self, config: Any) -> None:
        takes, gives = config.in_channels, config.out_channels or config.in_channels
        if takes != gives or config.patch_size != 1:
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes {takes} channels and gives {gives} "
                            f"in patches of {config.patch_size} (another variant, as Fill, Depth and Canny are); "
                            f"family '{self.name}' takes dev and schnell")  # fmt: skip
        if takes != PACK**2 * self.latent_shape[0]:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {takes / PACK**2:g} channels, not "
                            f"{self.latent_shape[0]}")  # fmt: skip
        if "embedded_guidance" in self.given and not config.guidance_embeds:
            raise UserError(f"teacher.options.embedded_guidance: the transformer in '{self.path}' takes no guidance "
                            f"(guidance_embeds is false, as schnell's); leave it out")  # fmt: skip

    @property
    def unguided(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The pipeline's ``guidance_scale`` is the network's input, not classifier-free guidance."""
        return {"guidance_scale": float(self.options["embedded_guidance"])}

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Return tokens [B, N, 4 C]."""
        return pack(latents, PACK)
