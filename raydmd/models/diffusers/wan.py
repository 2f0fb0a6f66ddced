"""Wan 2.1 and 2.2 (text or image to video, text to image): diffusers' WanTransformer3DModel behind the protocol."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.errors import UserError
from raydmd.models.base import IMAGE_COLUMN, Conditions, bucket_column, require_column
from raydmd.models.diffusers.autoencoder import WanAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.student_sampler import Inputs, Sampler, wan_samplers
from raydmd.models.diffusers.teacher_folder import SECOND, read_index
from raydmd.models.diffusers.two_networks import TwoNetworkDenoiser

TIMESTEPS = 1000.0
"""Wan's network counts time from 0 to 1000."""
TOKENS = 512
"""Of a prompt, padded with zeros."""
ORIGINAL = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
"""Names of a block's layers in Wan's own code."""


class WanDenoiser(PretrainedDenoiser):
    """Takes [B, C, frames, H, W]; gives the network 1000 t, and an image's latents as further channels."""

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents``, given ``prompt_embeds`` [B, L, D] and perhaps ``image_latents``."""
        dtype = self.dtype
        x = latents.to(dtype)
        if "image_latents" in conditions:
            x = torch.cat([x, conditions["image_latents"].to(dtype)], dim=1)
        flow = self.network(
            hidden_states=x,
            timestep=TIMESTEPS * t.to(torch.float32),
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return flow.to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the transformer's blocks."""
        return {f"blocks.{number}": block for number, block in enumerate(self.network.blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the tokens along frames, height and width."""
        config = self.network.config
        grid = [side // patch for side, patch in zip(latent_shape[1:], config.patch_size, strict=True)]
        return config.num_attention_heads * config.attention_head_dim, *grid


class WanFamily(PretrainedFamily):
    """Wan, by prompts encoded beforehand, or by text where the teacher's text encoder is there.

    Columns: ``prompt_embeds`` [L, D] and ``negative_prompt_embeds`` [L, D], both padded with zeros to one length
    (512 for Wan's own), since the network sees the padding; with the option ``image_channels`` also
    ``image_latents`` [image_channels, frames, H, W] (mask and encoded image; 20 for Wan 2.2 I2V), which
    `encode_first_frames` makes of a picture.
    The default ``latent_shape`` is of 81 frames of 480 x 832. Of Wan 2.2's two transformers each sample is scored by
    the one of its own t; ``subfolder: transformer`` or ``transformer_2`` takes one of them alone.
    """

    name: ClassVar[str] = "wan"
    pipeline_class: ClassVar[str] = "WanPipeline"
    network_class: ClassVar[str] = "WanTransformer3DModel"
    denoiser = WanDenoiser
    autoencoder = WanAutoencoder
    widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "text_dim"}
    text_tokens = TOKENS
    second_network: ClassVar[str | None] = "transformer_2"
    defaults: ClassVar[Mapping[str, Any]] = {
        **PretrainedFamily.defaults, "latent_shape": [16, 21, 60, 104], "image_channels": 0,
    }  # fmt: skip
    meanings: ClassVar[Mapping[str, str]] = {
        "image_channels": "further channels that the network takes from image to video (20 for Wan 2.2); 0: from text",
    }
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    condition_columns = ["prompt_embeds", "negative_prompt_embeds"]

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        self._sizes: dict[str, tuple[int, ...]] = {}  # of buckets, by the column of their first frames
        if self.options["image_channels"]:
            self.condition_columns = [*self.condition_columns, IMAGE_COLUMN]

    def use_buckets(self, sizes: Sequence[tuple[int, ...]]) -> None:
        """Have a column of first frames for each bucket, beside that of ``latent_shape``'s own size."""
        if self.options["image_channels"]:
            self._sizes = {bucket_column(size): size for size in sizes}
            self.condition_columns = [*self.condition_columns, *self._sizes]

    def without_buckets(self) -> Self:
        """Return the family without the buckets' columns of first frames."""
        other = copy.copy(self)
        other.condition_columns = [name for name in self.condition_columns if name not in self._sizes]
        other._sizes = {}
        return other

    def for_size(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Take the first frames at the samples' own size as ``image_latents``, and leave out the others."""
        images = [IMAGE_COLUMN, *self._sizes]
        kept = {name: value for name, value in conditions.items() if name not in images}
        own = [name for name in images if name in conditions and self._fits(conditions[name])]
        return {**kept, IMAGE_COLUMN: conditions[own[0]]} if own else kept

    def _fits(self, image: Any) -> bool:
        return tuple(image.shape[2:]) == self.latent_shape[1:]

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The pipeline of text to video, or with the option ``image_channels`` that of image to video."""
        return ("WanImageToVideoPipeline",) if self.options["image_channels"] else (self.pipeline_class,)

    @property
    def two_guidance_scales(self) -> bool:
        """Whether the teacher has two transformers; while it is not named it may have."""
        return "subfolder" not in self.given and (self.path is None or self.teacher_folder().both)

    def _wrap_two(self, high: Any, low: Any, boundary: float) -> PretrainedDenoiser:
        """Put Wan 2.2's two transformers behind the protocol."""
        return TwoNetworkDenoiser(WanDenoiser(high), WanDenoiser(low, SECOND), boundary)

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return the columns as tensors; an image's latents are of the sample's frames and sides."""
        conditions = super().conditions(rows)
        if self.options["image_channels"]:
            shapes = {IMAGE_COLUMN: self.latent_shape}
            shapes |= {name: self.sample_shape(size[0] if len(size) == 3 else None, size[-2], size[-1])
                       for name, size in self._sizes.items()}  # fmt: skip
            for name, shape in shapes.items():
                require_column(rows, name)
                wanted = (self.options["image_channels"], *shape[1:])
                if conditions[name].shape[1:] != wanted:
                    raise UserError(f"prompts: column '{name}' is {list(conditions[name].shape[1:])} a row, not "
                                    f"{list(wanted)}")  # fmt: skip
        return conditions

    def encode_first_frames(self, pictures: Tensor) -> Tensor:
        """Return ``image_latents`` of videos that begin with some pictures, as diffusers' WanImageToVideoPipeline.

        First come the channels of a mask, one for each frame of a latent's, which is 1 where the frames are given (in
        the first latent), then the VAE's latents of the picture followed by grey frames.

        Args:
            pictures: [B, 3, height, width] in [-1, 1], the first frames; of any sides that the VAE divides.

        Returns:
            [B, image_channels, frames, H, W], float32, with ``latent_shape``'s frames.

        Raises:
            UserError: the teacher takes no image, other channels than these, or has no VAE.
        """
        wanted, channels = self.options["image_channels"], self.vae.temporal + self.latent_shape[0]
        if wanted != channels:
            raise UserError(f"teacher.options.image_channels: a first frame makes {channels} of them (a mask of "
                            f"{self.vae.temporal} and latents of {self.latent_shape[0]}), not {wanted}")  # fmt: skip
        if (network := self._load_vae()) is None:
            self.check_pixels("teacher.path")
        frames = pictures.new_zeros(len(pictures), self.frames, *pictures.shape[1:])
        frames[:, 0] = pictures
        latents = self.vae.encode_pixels(network.to(pictures.device), frames)
        mask = latents.new_zeros(len(latents), self.vae.temporal, *latents.shape[2:])
        mask[:, :, 0] = 1.0
        return torch.cat([mask, latents], dim=1)

    def pipeline_inputs(self, conditions: Conditions) -> tuple[Conditions, Inputs]:
        """Return them with one picture as the first frame of all, where it takes one: the pipeline encodes its own."""
        conditions, inputs = super().pipeline_inputs(conditions)
        if IMAGE_COLUMN not in inputs:
            return conditions, inputs
        (width, height), draw = self.picture_size, torch.Generator().manual_seed(0)
        picture = F.interpolate(torch.rand(1, 3, 4, 6, generator=draw), (height, width), mode="bilinear")  # in [0, 1]
        latents = self.encode_first_frames(2.0 * picture - 1.0)
        latents = latents.expand(len(conditions[IMAGE_COLUMN]), *latents.shape[1:])
        prompts = {name: value for name, value in inputs.items() if name != IMAGE_COLUMN}
        return {**conditions, IMAGE_COLUMN: latents}, {**prompts, "image": picture}

    @property
    def reads_text(self) -> bool:
        """Whether there is a text encoder, and text is all that is needed."""
        return super().reads_text and not self.options["image_channels"]

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the column, of `TOKENS` tokens."""
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        return {"prompt_embeds": embeds.float().cpu().numpy()}

    def _check_latent_shape(self) -> None:
        if len(self.latent_shape) != 4:
            raise UserError(f"teacher.options.latent_shape: [C, frames, H, W], not {list(self.latent_shape)}")

    def _check_config(self, config: Any) -> None:
        shape, images = self.latent_shape, self.options["image_channels"]
        if images and read_index(self._root()).get("expand_timesteps"):
            raise UserError(f"teacher.path: the pipeline in '{self.path}' has expand_timesteps (TI2V-5B: the first "
                            f"frame replaces latents, at a time of its own), which family 'wan' does not follow; "
                            f"without teacher.options.image_channels it makes videos of text")  # fmt: skip
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise UserError(f"teacher.path: the transformer in '{self.path}' attends to an image's embeddings "
                            f"(image_dim {config.image_dim}, as Wan 2.1's image to video does), which family 'wan' "
                            f"does not give it")  # fmt: skip
        if config.in_channels not in ((out := config.out_channels or config.in_channels), out + images):
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes {config.in_channels} channels and "
                            f"gives {out}; an image's go with teacher.options.image_channels: "
                            f"{config.in_channels - out}, not {images}")  # fmt: skip
        if config.in_channels != shape[0] + images:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {config.in_channels} channels, not "
                            f"{shape[0]} and image_channels {images}")  # fmt: skip
        if any(size % patch for size, patch in zip(shape[1:], config.patch_size, strict=True)):
            raise UserError(
                f"teacher.options.latent_shape: {list(shape[1:])} is not divisible by the teacher's patches "
                f"{list(config.patch_size)}"
            )
        tokens = [size // patch for size, patch in zip(shape[1:], config.patch_size, strict=True)]
        if max(tokens) > config.rope_max_seq_len:
            raise UserError(f"teacher.options.latent_shape: {list(shape[1:])} makes {tokens} patches along the axes, "
                            f"but the teacher has {config.rope_max_seq_len} positions along each")  # fmt: skip

    def student_samplers(self, times: Sequence[float]) -> list[Sampler]:
        """Return samplers for WanPipeline, which takes no sigmas."""
        return wan_samplers(times)

    def original_layer(self, layer: str) -> str:
        """Return the name in Wan's own code.

        Raises:
            UserError: a layer outside the blocks.
        """
        blocks, number, rest = (*layer.split(".", 2), "", "")[:3]
        if blocks != "blocks" or rest not in ORIGINAL:
            return super().original_layer(layer)
        return f"blocks.{number}.{ORIGINAL[rest]}"
