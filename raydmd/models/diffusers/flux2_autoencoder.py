"""Flux.2's VAE: its latents in patches of 2 x 2, each of the patches' channels with a mean and a deviation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from raydmd.diffusion.schedule import at_least_float32
from raydmd.errors import UserError
from raydmd.models.diffusers.autoencoder import FILE, Autoencoder, check_channels, whole

DEFAULTS: Mapping[str, Any] = {
    "latent_channels": 32, "block_out_channels": (128, 256, 512, 512), "patch_size": (2, 2), "batch_norm_eps": 1e-4,
}  # fmt: skip
"""Of AutoencoderKLFlux2, where its config says nothing."""


def patchify(latents: Tensor, p: int) -> Tensor:
    """Return [B, C, H, W] as [B, C p p, H/p, W/p], as `Flux2KleinPipeline._patchify_latents` for p = 2."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // p, p, width // p, p).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, channels * p * p, height // p, width // p)


def unpatchify(patches: Tensor, p: int) -> Tensor:
    """Return [B, C p p, H/p, W/p] as [B, C, H, W]."""
    batch, channels, height, width = patches.shape
    latents = patches.reshape(batch, channels // p**2, p, p, height, width).permute(0, 1, 4, 2, 5, 3)
    return latents.reshape(batch, channels // p**2, height * p, width * p)


@dataclass(frozen=True)
class Flux2Autoencoder(Autoencoder):
    """The statistics are the running ones of the VAE's batch norm, which are with its weights, not in its config.

    Attributes:
        spatial: pixels along a patch's side.
        temporal: 1: there are no frames.
        patch: of the VAE's latents along a side, to one of the denoiser's.
        eps: added to the variances.
    """

    class_name: ClassVar[str] = "AutoencoderKLFlux2"
    spatial: int = 16
    temporal: int = 1
    patch: int = 2
    eps: float = 1e-4

    @classmethod
    def read(cls, config: Mapping[str, Any], channels: int) -> Self:
        """Read the levels, each of which but the last doubles the sides, and the patches.

        Raises:
            UserError: another VAE, patches that are not square, or latents of other channels.
        """
        if (kind := config.get("_class_name", cls.class_name)) != cls.class_name:
            raise UserError(f"teacher.path: {FILE} is of class {kind}, not {cls.class_name}")
        config = {**DEFAULTS, **config}
        levels, patch = config["block_out_channels"], config["patch_size"]
        if not isinstance(levels, list | tuple) or not levels:
            raise UserError(f"teacher.path: {FILE}: block_out_channels is {levels!r}, not a list of numbers")
        sides = tuple(patch) if isinstance(patch, list | tuple) else ()
        if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or sides[0] < 1:
            raise UserError(f"teacher.path: {FILE}: patch_size is {patch!r}, not two equal whole numbers")
        check_channels(whole(config, "latent_channels") * sides[0] ** 2, channels)
        return cls(sides[0] * 2 ** (len(levels) - 1), 1, sides[0], float(config["batch_norm_eps"]))

    def decode_pixels(self, network: Any, latents: Tensor) -> Tensor:
        """Return one frame of latents of one frame."""
        mean, std = self._statistics(network)
        scaled = unpatchify(latents[:, :, 0].to(network.dtype) * std + mean, self.patch)
        return at_least_float32(network.decode(scaled, return_dict=False)[0])[:, None]

    @torch.no_grad()
    def encode_pixels(self, network: Any, frames: Tensor) -> Tensor:
        """Return latents of one frame, of mean 0 and deviation 1."""
        mean, std = self._statistics(network)
        latents = patchify(network.encode(frames[:, 0].to(network.dtype)).latent_dist.mode(), self.patch)
        return at_least_float32((latents - mean) / std)[:, :, None]

    def _statistics(self, network: Any) -> tuple[Tensor, Tensor]:
        mean, variance = network.bn.running_mean.view(1, -1, 1, 1), network.bn.running_var.view(1, -1, 1, 1)
        return mean, (variance + self.eps).sqrt()
