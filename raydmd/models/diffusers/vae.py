"""The VAE beside a pretrained transformer: its factors and statistics by its config, and decoding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydmd.diffusion.schedule import at_least_float32
from raydmd.errors import UserError

FILE = "vae/config.json"
DIM_MULT, DOWNSAMPLED = (1, 2, 4, 4), (False, True, True)
"""Channels by level and levels that halve the frames, of the VAEs of Qwen-Image and Wan 2.1."""


@dataclass(frozen=True)
class VaeConfig:
    """What must be known of a VAE without its weights.

    Attributes:
        spatial: pixels along a latent's side.
        temporal: frames to a latent's, after the first, which stands alone.
        mean: of the latents that it was trained on, by channel; empty where there is no VAE.
        std: of these.
    """

    spatial: int = 8
    temporal: int = 4
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def frames(self, latent_frames: int) -> int:
        """Return how many frames come of latents [C, latent_frames, H, W]."""
        return 1 + self.temporal * (latent_frames - 1)


def vae_config(config: Mapping[str, Any], channels: int) -> VaeConfig:
    """Read a VAE's config.json.

    The factors are those of the decoder's structure: each level but the last doubles the sides, a level of
    ``temperal_downsample`` the frames, and a last patch of ``patch_size`` the sides again. Where the structure is not
    there, ``scale_factor_spatial`` and ``scale_factor_temporal`` say them.

    Args:
        config: of AutoencoderKLQwenImage or AutoencoderKLWan.
        channels: of the latents, by ``latent_shape``.

    Raises:
        UserError: it is of another kind, or for latents of other channels.
    """
    levels, halved = config.get("dim_mult"), config.get("temperal_downsample")
    if levels is None and "scale_factor_spatial" in config:
        spatial = _whole(config, "scale_factor_spatial")
        temporal = _whole(config, "scale_factor_temporal") if "scale_factor_temporal" in config else 4
    else:
        levels, halved = list(DIM_MULT if levels is None else levels), list(DOWNSAMPLED if halved is None else halved)
        patch = 1 if config.get("patch_size") is None else _whole(config, "patch_size")
        spatial, temporal = patch * 2 ** (len(levels) - 1), 2 ** sum(map(bool, halved[: len(levels) - 1]))
    mean, std = (_numbers(config, key) for key in ("latents_mean", "latents_std"))
    own = config.get("z_dim", len(mean))
    if not len(mean) == len(std) == own:
        raise UserError(f"teacher.path: {FILE}: latents_mean and latents_std have {len(mean)} and {len(std)} numbers, "
                        f"not z_dim {own}")  # fmt: skip
    if own != channels:
        raise UserError(f"teacher.options.latent_shape: the VAE takes {own} channels, not {channels}")
    if min(std) <= 0.0:
        raise UserError(f"teacher.path: {FILE}: latents_std has {min(std):g}, which is not above 0")
    return VaeConfig(spatial, temporal, mean, std)


def decoding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return in which precision a VAE decodes: float16's range is too small for its activations, bfloat16's is not."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.no_grad()
def decode_latents(vae: Any, config: VaeConfig, latents: Tensor) -> Tensor:
    """Return frames [B, F, 3, H, W] in [0, 1] of latents [B, C, f, h, w] as the network sees them.

    A value that is not finite comes out as NaN.
    """
    frames = decode_pixels(vae, config, latents).clamp(-1, 1)
    return torch.where(frames.isfinite(), (frames / 2 + 0.5).clamp(0, 1), torch.nan)


def decode_pixels(vae: Any, config: VaeConfig, latents: Tensor) -> Tensor:
    """Return frames [B, F, 3, H, W], about -1 to 1, of latents [B, C, f, h, w] as the network sees them.

    They are scaled to the VAE's own statistics first. The VAE's own ``decode`` clamps, and what lies outside would have
    no gradient: so its decoder's outputs, one a latent frame, are taken from before.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    made: list[Tensor] = []
    mean, std = (
        torch.tensor(numbers, device=latents.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for numbers in (config.mean, config.std)
    )
    handle = vae.decoder.register_forward_hook(lambda module, given, output: made.append(output))
    try:
        vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)
    finally:
        handle.remove()
    frames = torch.cat(made, dim=2)
    if (patch := vae.config.get("patch_size")) is not None:
        frames = unpatchify(frames, patch_size=patch)
    return at_least_float32(frames).transpose(1, 2)


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or value < 1:
        raise UserError(f"teacher.path: {FILE}: {key} is {value!r}, not a whole number above 0")
    return value


def _numbers(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = config.get(key)
    if not isinstance(values, list) or not values:
        raise UserError(f"teacher.path: {FILE}: {key} is not a list of numbers")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UserError(f"teacher.path: {FILE}: {key} is not a list of finite numbers")
    return tuple(float(value) for value in values)
