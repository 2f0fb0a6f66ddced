"""The VAE beside a pretrained denoiser: its factors and statistics by its config; decoding and encoding.

What an `Autoencoder` knows it reads from the VAE's config.json; the network itself is loaded by whoever decodes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from raydmd.diffusion.schedule import at_least_float32
from raydmd.errors import UserError

FILE = "vae/config.json"


class Autoencoder(ABC):
    """What must be known of a VAE without its weights, and how latents as the denoiser sees them are the VAE's.

    Attributes:
        class_name: diffusers' class of it.
        spatial: pixels along a latent's side.
        temporal: frames to a latent's, after the first, which stands alone.
    """

    class_name: ClassVar[str]
    spatial: int
    temporal: int

    @classmethod
    @abstractmethod
    def read(cls, config: Mapping[str, Any], channels: int) -> Self:
        """Read a VAE's config.json.

        Args:
            config: of ``class_name``.
            channels: of the latents, by ``latent_shape``.

        Raises:
            UserError: it is of another kind, or for latents of other channels.
        """

    @abstractmethod
    def decode_pixels(self, network: Any, latents: Tensor) -> Tensor:
        """Return frames [B, F, 3, H, W], about -1 to 1 and not clamped, of latents [B, C, f, h, w]."""

    @abstractmethod
    def encode_pixels(self, network: Any, frames: Tensor) -> Tensor:
        """Return latents [B, C, f, h, w] of frames [B, F, 3, H, W] in [-1, 1]: the most likely ones, without noise."""

    def frames(self, latent_frames: int) -> int:
        """Return how many frames come of latents [C, latent_frames, H, W]."""
        return 1 + self.temporal * (latent_frames - 1)

    @torch.no_grad()
    def decode(self, network: Any, latents: Tensor) -> Tensor:
        """Return frames [B, F, 3, H, W] in [0, 1] of latents [B, C, f, h, w]; what is not finite comes out as NaN."""
        frames = self.decode_pixels(network, latents).clamp(-1, 1)
        return torch.where(frames.isfinite(), (frames / 2 + 0.5).clamp(0, 1), torch.nan)


@dataclass(frozen=True)
class WanAutoencoder(Autoencoder):
    """The causal video VAE of Wan and Qwen-Image: each channel of its latents has a mean and a deviation.

    Attributes:
        spatial: pixels along a latent's side.
        temporal: frames to a latent's, after the first.
        mean: of the latents that the denoiser was trained on, by channel; empty where there is no VAE.
        std: of these.
    """

    class_name: ClassVar[str] = "AutoencoderKLWan"
    spatial: int = 8
    temporal: int = 4
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    DIM_MULT: ClassVar[tuple[int, ...]] = (1, 2, 4, 4)  # channels by level, where the config says nothing
    DOWNSAMPLED: ClassVar[tuple[bool, ...]] = (False, True, True)  # levels that halve the frames

    @classmethod
    def read(cls, config: Mapping[str, Any], channels: int) -> Self:
        """Read the factors and statistics.

        The factors are those of the decoder's structure: each level but the last doubles the sides, a level of
        ``temperal_downsample`` the frames, and a last patch of ``patch_size`` the sides again. Where the structure is
        not there, ``scale_factor_spatial`` and ``scale_factor_temporal`` say them.
        """
        levels, halved = config.get("dim_mult"), config.get("temperal_downsample")
        if levels is None and "scale_factor_spatial" in config:
            spatial = whole(config, "scale_factor_spatial")
            temporal = whole(config, "scale_factor_temporal") if "scale_factor_temporal" in config else 4
        else:
            levels = list(cls.DIM_MULT if levels is None else levels)
            halved = list(cls.DOWNSAMPLED if halved is None else halved)
            patch = 1 if config.get("patch_size") is None else whole(config, "patch_size")
            spatial, temporal = patch * 2 ** (len(levels) - 1), 2 ** sum(map(bool, halved[: len(levels) - 1]))
        mean, std = (numbers(config, key) for key in ("latents_mean", "latents_std"))
        own = config.get("z_dim", len(mean))
        if not len(mean) == len(std) == own:
            raise UserError(f"teacher.path: {FILE}: latents_mean and latents_std have {len(mean)} and {len(std)} "
                            f"numbers, not z_dim {own}")  # fmt: skip
        check_channels(own, channels)
        if min(std) <= 0.0:
            raise UserError(f"teacher.path: {FILE}: latents_std has {min(std):g}, which is not above 0")
        return cls(spatial, temporal, mean, std)

    def decode_pixels(self, network: Any, latents: Tensor) -> Tensor:
        """Return frames of latents, scaled to the VAE's own statistics first.

        The VAE's own ``decode`` clamps, and what lies outside would have no gradient: so its decoder's outputs, one a
        latent frame, are taken from before.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        made: list[Tensor] = []
        mean, std = self._statistics(network, latents)
        handle = network.decoder.register_forward_hook(lambda module, given, output: made.append(output))
        try:
            network.decode(latents.to(network.dtype) * std + mean, return_dict=False)
        finally:
            handle.remove()
        frames = torch.cat(made, dim=2)
        if (patch := network.config.get("patch_size")) is not None:
            frames = unpatchify(frames, patch_size=patch)
        return at_least_float32(frames).transpose(1, 2)

    @torch.no_grad()
    def encode_pixels(self, network: Any, frames: Tensor) -> Tensor:
        """Return latents of frames, scaled to a mean of 0 and a deviation of 1."""
        mean, std = self._statistics(network, frames)
        latents = network.encode(frames.transpose(1, 2).to(network.dtype)).latent_dist.mode()
        return at_least_float32((latents - mean) / std)

    def _statistics(self, network: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=like.device, dtype=network.dtype).view(1, -1, 1, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


class QwenImageAutoencoder(WanAutoencoder):
    """Qwen-Image's: Wan 2.1's structure, in a class of its own."""

    class_name: ClassVar[str] = "AutoencoderKLQwenImage"


@dataclass(frozen=True)
class ImageAutoencoder(Autoencoder):
    """A picture's VAE with one scale for all channels: Stable Diffusion's, SD3's, Flux's.

    Attributes:
        spatial: pixels along a latent's side.
        temporal: 1: there are no frames.
        scaling: what the VAE's latents, less ``shift``, are multiplied by for the denoiser.
        shift: subtracted from them before.
    """

    class_name: ClassVar[str] = "AutoencoderKL"
    spatial: int = 8
    temporal: int = 1
    scaling: float = 1.0
    shift: float = 0.0

    @classmethod
    def read(cls, config: Mapping[str, Any], channels: int) -> Self:
        """Read ``block_out_channels``, each level of which but the last doubles the sides, and the scale."""
        levels = config.get("block_out_channels", (64,))
        if not isinstance(levels, list | tuple) or not levels:
            raise UserError(f"teacher.path: {FILE}: block_out_channels is {levels!r}, not a list of numbers")
        check_channels(whole({"latent_channels": 4, **config}, "latent_channels"), channels)
        scaling, shift = number(config, "scaling_factor", 0.18215), number(config, "shift_factor", 0.0)
        if scaling <= 0.0:
            raise UserError(f"teacher.path: {FILE}: scaling_factor is {scaling:g}, which is not above 0")
        return cls(2 ** (len(levels) - 1), 1, scaling, shift)

    def decode_pixels(self, network: Any, latents: Tensor) -> Tensor:
        """Return one frame of latents of one frame."""
        scaled = latents[:, :, 0].to(network.dtype) / self.scaling + self.shift
        return at_least_float32(network.decode(scaled, return_dict=False)[0])[:, None]

    @torch.no_grad()
    def encode_pixels(self, network: Any, frames: Tensor) -> Tensor:
        """Return latents of one frame."""
        latents = network.encode(frames[:, 0].to(network.dtype)).latent_dist.mode()
        return at_least_float32((latents - self.shift) * self.scaling)[:, :, None]


def decoding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return in which precision a VAE decodes: float16's range is too small for its activations, bfloat16's is not."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_channels(own: int, channels: int) -> None:
    """Refuse a VAE whose latents have other channels than ``latent_shape``.

    Raises:
        UserError: they differ.
    """
    if own != channels:
        raise UserError(f"teacher.options.latent_shape: the VAE takes {own} channels, not {channels}")


def whole(config: Mapping[str, Any], key: str) -> int:
    """Return a whole number above 0 of a VAE's config.

    Raises:
        UserError: it is none.
    """
    value = config[key]
    if type(value) is not int or value < 1:
        raise UserError(f"teacher.path: {FILE}: {key} is {value!r}, not a whole number above 0")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a finite number of a VAE's config; ``default`` where it is not there or null.

    Raises:
        UserError: it is none.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"teacher.path: {FILE}: {key} is {value!r}, not a finite number")
    return float(value)


def numbers(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Return a list of finite numbers of a VAE's config.

    Raises:
        UserError: it is none.
    """
    values = config.get(key)
    if not isinstance(values, list) or not values:
        raise UserError(f"teacher.path: {FILE}: {key} is not a list of numbers")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UserError(f"teacher.path: {FILE}: {key} is not a list of finite numbers")
    return tuple(float(value) for value in values)
