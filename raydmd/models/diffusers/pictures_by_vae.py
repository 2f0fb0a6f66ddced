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
        self._loaded: dict[str, Any] = {}  # the VAE; shared by `resized`

    def _check_latent_shape(self) -> None:
        """Refuse a latent shape that the network cannot take."""

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
        if not self._loaded and self.path is not None and self._has_part("vae"):
            self._fetch("vae/*")
            folder, dtype = self._root() / "vae", decoding_dtype(DTYPES[self.options["dtype"]])
            variant = variant_of(folder, self.options["variant"])
            network = load_model(self.autoencoder.class_name, folder, variant, dtype)
            self._loaded["vae"] = network.requires_grad_(False).eval()
        return self._loaded.get("vae")

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

    @property
    def side_units(self) -> tuple[int, int]:
        """What divides a sample's height and its width in pixels, by the VAE's factor and the network's patches."""
        spatial, (_, high, wide) = self.vae.spatial, self.patches
        return spatial * high, spatial * wide

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the latents of a picture of another size.

        Raises:
            UserError: a side that the VAE or the network's patches or levels do not divide.
        """
        high, wide = self.side_units
        if width % wide or height % high:
            sides = f"{wide}" if wide == high else f"{wide} and {high}"
            raise UserError(f"sizes: {width}x{height} is not of sides that {sides} divides")
        return (*self.latent_shape[:-2], height // self.vae.spatial, width // self.vae.spatial)

    def sample_shape(self, frames: int | None, height: int, width: int) -> tuple[int, ...]:
        """Return the latents' shape of a size that the VAE, in space and time, and the network's patches divide."""
        units, sides = self.side_units, (height, width)
        near = [max(unit, unit * round(side / unit)) for side, unit in zip(sides, units, strict=True)]
        if near != [height, width]:
            by = f"{units[0]}" if units[0] == units[1] else f"{units[0]} and {units[1]}"
            raise UserError(f"the sides {height} and {width} are not multiples of {by}, by the VAE's factor and the "
                            f"network's patches or levels; the nearest that are: {near}")  # fmt: skip
        shape = self.shape_for(width, height)
        if frames is None or frames == self.frames:
            return shape
        made = self._frame_counts(frames)
        if set(made) == {1}:
            raise UserError(f"family '{self.name}' makes pictures, not {frames} frames; leave the frames out")
        if frames not in made:
            below, above = [n for n in made if n < frames], [n for n in made if n > frames]
            two = " and ".join(str(n) for n in (*below[-1:], *above[:1]))
            raise UserError(f"there is no video of {frames} frames, by the VAE's factor of {self.vae.temporal} in time "
                            f"(4k + 1 where it is 4); the nearest: {two}")  # fmt: skip
        return (shape[0], made[frames], *shape[-2:])

    def _frame_counts(self, most: int) -> dict[int, int]:
        """Return what counts of frames samples may have, up to one above ``most``, each with the latents'."""
        if len(self.latent_shape) < 4:
            return {1: 1}
        made, step = dict[int, int](), (self.patches or (1,))[0]
        for latents in range(step, most + 3 * step, step):
            sized = self.resized((self.latent_shape[0], latents, *self.latent_shape[-2:]))
            try:
                sized._check_latent_shape()
            except UserError:
                continue
            made[sized.frames] = latents
            if sized.frames > most:
                break
        return dict(sorted(made.items()))
