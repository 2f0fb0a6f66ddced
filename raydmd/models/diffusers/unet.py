"""What Stable Diffusion's UNets share: diffusers' UNet2DConditionModel behind the protocol, and its families' sizes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from raydmd.diffusion.schedule import VariancePreserving
from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.autoencoder import ImageAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.variance_preserving import VariancePreservingFamily


class UNetBlocks(PretrainedDenoiser):
    """A UNet of diffusers, whose encoder's and middle block's features can be read."""

    component = "unet"

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the encoder's blocks and the middle one, which DMD2's discriminator reads (DMD2 Sec. 4.3)."""
        blocks = {f"down_blocks.{level}": block for level, block in enumerate(self.network.down_blocks)}
        return {**blocks, "mid_block": self.network.mid_block}

    def block_shape(self, name: str, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a block's channels, height and width: each of the encoder's but the last halves the sides."""
        channels = self.network.config.block_out_channels
        last = len(channels) - 1
        level = last if name == "mid_block" else int(name.rpartition(".")[2])
        halved = 2 ** min(level + 1, last)
        return channels[level], latent_shape[-2] // halved, latent_shape[-1] // halved

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the features alone of an encoder's block, which also puts out those of its layers."""
        features: Tensor = output[0] if isinstance(output, tuple) else output
        return features


class UNetDenoiser(UNetBlocks):
    """Takes [B, C, H, W]; gives the network the timestep of t, which need not be whole, and is 0 at least.

    Args:
        network: the UNet.
        schedule: the process whose steps it counts.
    """

    def __init__(self, network: nn.Module, schedule: VariancePreserving) -> None:
        super().__init__(network)
        self.schedule = schedule

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict from ``latents``, given ``prompt_embeds`` [B, L, D] and what `added` takes."""
        prediction: Tensor = self.network(
            latents.to(self.dtype),
            self.schedule.timestep_of(t).clamp(min=0.0).float().to(latents.device),
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            added_cond_kwargs=self.added(latents, conditions),
            return_dict=False,
        )[0]
        return prediction.to(latents.dtype)

    def added(self, latents: Tensor, conditions: Conditions) -> dict[str, Tensor] | None:
        """Return what is added to the time's embedding, by its name in diffusers; by default nothing."""
        return None


class UNetFamily(VariancePreservingFamily):
    """A family of Stable Diffusion's kind: latents [C, H, W], whose sides the UNet's levels halve."""

    network_class: ClassVar[str] = "UNet2DConditionModel"
    autoencoder = ImageAutoencoder
    levels: ClassVar[int]  # of the UNet, where its config is not there
    addition: ClassVar[str | None]  # `addition_embed_type` of the UNet's config
    widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "cross_attention_dim"}
    defaults: ClassVar[Mapping[str, Any]] = {**PretrainedFamily.defaults, "subfolder": "unet"}
    lora_targets = [
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj",
    ]  # fmt: skip

    @property
    def patches(self) -> None:  # type: ignore[override]
        """None: a UNet has no tokens."""
        return None

    @property
    def multiple(self) -> int:
        """What divides the latents' sides: 2 for each of the UNet's levels but the last."""
        channels = self.network_config.get("block_out_channels")
        return int(2 ** ((len(channels) if channels else self.levels) - 1))

    @property
    def side_units(self) -> tuple[int, int]:
        """What divides a picture's height and its width in pixels, by the VAE's factor and the UNet's levels."""
        return self.vae.spatial * self.multiple, self.vae.spatial * self.multiple

    def _tokens(self, shape: tuple[int, ...]) -> int:
        """Return the latents of a channel: the times do not depend on how many there are."""
        return shape[-2] * shape[-1]

    def _check_latent_shape(self) -> None:
        if len(self.latent_shape) != 3:
            raise UserError(f"teacher.options.latent_shape: [C, H, W], not {list(self.latent_shape)}")

    def _check_config(self, config: Any) -> None:
        where, channels = f"teacher.path: the UNet in '{self.path}'", self.latent_shape[0]
        if config.in_channels != config.out_channels:
            raise UserError(f"{where} takes {config.in_channels} channels and gives {config.out_channels} (one that "
                            f"paints in, or edits); family '{self.name}' takes text to image's")  # fmt: skip
        if config.in_channels != channels:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {config.in_channels} channels, not "
                            f"{channels}")  # fmt: skip
        if config.time_cond_proj_dim is not None:
            raise UserError(f"{where} takes the guidance's scale (time_cond_proj_dim, a guidance-distilled one), which "
                            f"family '{self.name}' does not give it")  # fmt: skip
        if config.addition_embed_type != self.addition:
            raise UserError(f"{where} has addition_embed_type {config.addition_embed_type}, not {self.addition} as "
                            f"those of family '{self.name}'")  # fmt: skip
        for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if config.get(key) is not None:
                raise UserError(f"{where} has {key} {config.get(key)}, which family '{self.name}' does not know")
        if config.mid_block_type is None:
            raise UserError(f"{where} has no middle block (a pruned one), which family '{self.name}' does not know")
        check_latent_sides(self.latent_shape, len(config.block_out_channels))

    def _wrap(self, network: Any) -> PretrainedDenoiser:
        return UNetDenoiser(network, self.schedule)


def check_latent_sides(shape: tuple[int, ...], levels: int) -> None:
    """Refuse latents whose sides a UNet's levels do not halve.

    Raises:
        UserError: 2^(levels - 1) does not divide a side.
    """
    sides, multiple = list(shape[-2:]), 2 ** (levels - 1)
    if any(side % multiple for side in sides):
        raise UserError(f"teacher.options.latent_shape: {sides} is not divisible by {multiple}, as the UNet's {levels} "
                        f"levels need")  # fmt: skip


def array(embeddings: Tensor) -> np.ndarray:
    """Return a text encoder's output as a column."""
    return embeddings.float().cpu().numpy()
