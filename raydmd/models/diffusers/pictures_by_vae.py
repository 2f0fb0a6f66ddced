"""A diffusers teacher's pictures: their size in latents, and the VAE beside the network, to pixels and back."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from raydmd.errors import UserError
from raydmd.models.diffusers.autoencoder import Autoencoder, decoding_dtype
from raydmd.models.diffusers.config_files import read_config
from raydmd.models.diffusers.denoiser import with_frames
from raydmd.models.diffusers.loading import load_model
from raydmd.models.diffusers.pipeline_folder import DTYPES, PipelineFolder
from raydmd.models.diffusers.teacher_folder import CONFIG
from raydmd.models.diffusers.weight_files import variant_of


class PicturesByVAE(PipelineFolder):
    """A family whose samples are latents of a pipeline's VAE.

    Attributes:
        autoencoder: the VAE's factors and scales.
        patch: as `patches`, where the network's config is not there or silent.
    """

    autoencoder: ClassVar[type[Autoencoder]]
    patch: ClassVar[tuple[int, int, int]] = (1, 2, 2)

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        self._vae: Any = None

    @cached_property
    def vae(self) -> Autoencoder:
        """The VAE's factors and scales; the usual ones where there is none.

        Raises:
            UserError: the VAE is of another kind, or for latents of other channels.
        """
        config = None if self.path is None else read_config(self._root(), "vae")
        return self.autoencoder() if config is None else self.autoencoder.read(config, self.latent_shape[0])

    def check_pixels(self, key: str) -> None:
        """Refuse a teacher without a VAE."""
        if self.path is None or not self._has_part("vae"):
            raise UserError(f"{key}: the teacher '{self.path}' has no VAE (vae/{CONFIG}), without which there are no "
                            f"pixels")  # fmt: skip

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Return pixels [B, F, 3, H, W] by the VAE beside the network, which is frozen.

        Raises:
            UserError: there is none.
        """
        if (network := self._load_vae()) is None:
            self.check_pixels("teacher.path")
        return self.vae.decode_pixels(network.to(latents.device), with_frames(latents))

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Three channels and the picture's sides, where a sample is of one frame and there is a VAE.

        Raises:
            UserError: samples are videos, or there is no VAE.
        """
        if self.frames > 1:
            return super().picture_shape
        self.check_pixels("teacher.path")
        width, height = self.picture_size
        return 3, height, width

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return latents [B, *latent_shape] of pictures [B, 3, H, W] in [-1, 1], by the VAE beside the network.

        Raises:
            UserError: there is none, or samples are videos.
        """
        if self.frames > 1:
            return super().encode_pixels(pixels)
        if (network := self._load_vae()) is None:
            self.check_pixels("teacher.path")
        latents = self.vae.encode_pixels(network.to(pixels.device), pixels[:, None])
        return latents.reshape(len(pixels), *self.latent_shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures [B, 3, H, W] in [0, 1] (a video's middle frame), by the VAE beside the network.

        Without a VAE, the latents' first three channels are shown, each sample scaled to [0, 1].
        """
        if latents.ndim == 5 and self._load_vae() is None:
            middle = latents.shape[2] // 2
            latents = latents[:, :, middle : middle + 1]
        frames = self.decode_video(latents)
        return frames[:, frames.shape[1] // 2]

    def decode_video(self, latents: Tensor) -> Tensor:
        """Return frames [B, F, 3, H, W] in [0, 1], by the VAE; without one, the latents' first three channels."""
        latents, network = with_frames(latents), self._load_vae()
        if network is None:
            shown = latents[:, :3].float()
            low, high = shown.amin((1, 2, 3, 4), keepdim=True), shown.amax((1, 2, 3, 4), keepdim=True)
            return ((shown - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1, -1).transpose(1, 2)
        return self.vae.decode(network.to(latents.device), latents)

    def _load_vae(self) -> Any:
        if self._vae is None and self.path is not None and self._has_part("vae"):
            self._fetch("vae/*")
            folder, dtype = self._root() / "vae", decoding_dtype(DTYPES[self.options["dtype"]])
            variant = variant_of(folder, self.options["variant"])
            network = load_model(self.autoencoder.class_name, folder, variant, dtype)
            self._vae = network.requires_grad_(False).eval()
        return self._vae

    @cached_property
    def patches(self) -> tuple[int, int, int]:
        """Latents of a token along frames, height and width, by the network's config.

        Raises:
            UserError: the config's ``patch_size`` is not one.
        """
        size = self.network_config.get("patch_size", self.patch)
        sizes = (1, size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
        if len(sizes) != 3 or not all(type(n) is int and n > 0 for n in sizes):
            raise UserError(f"teacher.path: the transformer's config.json has patch_size {size!r}, not whole numbers")
        return sizes

    @property
    def frames(self) -> int:
        """Frames of a sample, by the VAE's compression in time."""
        return self.vae.frames(self.latent_shape[1]) if len(self.latent_shape) == 4 else 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a picture of ``latent_shape``, in pixels, by the VAE's factor."""
        spatial = self.vae.spatial
        return spatial * self.latent_shape[-1], spatial * self.latent_shape[-2]

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the latents of a picture of another size.

        Raises:
            UserError: a side that the VAE or the network's patches do not divide.
        """
        spatial, (_, high, wide) = self.vae.spatial, self.patches
        if width % (spatial * wide) or height % (spatial * high):
            sides = f"{spatial * wide}" if wide == high else f"{spatial * wide} and {spatial * high}"
            raise UserError(f"sizes: {width}x{height} is not of sides that {sides} divides")
        return (*self.latent_shape[:-2], height // spatial, width // spatial)
