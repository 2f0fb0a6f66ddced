"""CogVideoX, text to video: diffusers' CogVideoXTransformer3DModel behind the protocol, and its VAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from raydmd.diffusion.schedule import VariancePreserving, at_least_float32
from raydmd.errors import UserError
from raydmd.models.base import Conditions
from raydmd.models.diffusers.autoencoder import Autoencoder, ImageAutoencoder, whole
from raydmd.models.diffusers.denoiser import PretrainedDenoiser, with_frames
from raydmd.models.diffusers.student_sampler import Sampler
from raydmd.models.diffusers.variance_preserving import PROCESS as PROCESS_KEYS
from raydmd.models.diffusers.variance_preserving import VariancePreservingFamily

PROCESS = {  # what CogVideoX's schedulers take where their config is silent
    "_class_name": "CogVideoXDDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "snr_shift_scale": 3.0,
}  # fmt: skip

SHIFTED = (*PROCESS_KEYS, "rescale_betas_zero_snr", "snr_shift_scale")
"""Of a scheduler's config, what says the process and the prediction."""


class CogVideoXDenoiser(PretrainedDenoiser):
    """Takes [B, C, frames, H, W], which the network has as [B, frames, C, H, W]; gives it the process' timestep.

    Args:
        network: diffusers' model.
        schedule: the process, whose timesteps the network counts.
    """

    def __init__(self, network: nn.Module, schedule: VariancePreserving) -> None:
        super().__init__(network)
        self.schedule = schedule

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict from ``latents``, given ``prompt_embeds`` [B, L, D]."""
        dtype, config = self.dtype, self.network.config
        x = latents.transpose(1, 2).to(dtype)
        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = rotary_embeddings(config, latents.shape[-3:], latents.device)
        made = self.network(
            hidden_states=x,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            timestep=self.schedule.timestep_of(t).clamp(min=0.0).to(torch.float32),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return made.transpose(1, 2).to(latents.dtype)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the transformer's blocks."""
        return {f"blocks.{number}": block for number, block in enumerate(self.network.transformer_blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width, and the tokens along frames, height and width."""
        config = self.network.config
        p, frames = config.patch_size, latent_shape[-3] // (config.patch_size_t or 1)
        width = config.num_attention_heads * config.attention_head_dim
        return width, frames, latent_shape[-2] // p, latent_shape[-1] // p

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Take the video's tokens, the first of a block's two outputs."""
        return super().feature_map(output[0], shape)


def rotary_embeddings(config: Any, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [tokens, head width] for latents of ``shape`` (frames, H, W).

    As ``_prepare_rotary_positional_embeddings`` of diffusers' CogVideoXPipeline: 1.0's positions are those of the
    region that a sample of this shape takes in one of the network's own size; 1.5's are whole numbers.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    p, p_t = config.patch_size, config.patch_size_t
    frames, grid = shape[0], (shape[1] // p, shape[2] // p)
    own = config.sample_height // p, config.sample_width // p
    if p_t is None:
        law: dict[str, Any] = {"crops_coords": crop_region(grid, own), "temporal_size": frames}
    else:
        law = {"crops_coords": None, "temporal_size": frames // p_t, "grid_type": "slice", "max_size": own}
    cos, sin = get_3d_rotary_pos_embed(config.attention_head_dim, grid_size=grid, device=device, **law)
    return cos, sin


def crop_region(grid: tuple[int, int], own: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the corners, (top, left) and (bottom, right), of a grid scaled to fit into the network's own, centred.

    As ``get_resize_crop_region_for_grid`` of diffusers.
    """
    (height, width), (own_height, own_width) = grid, own
    if height / width > own_height / own_width:
        sides = own_height, round(own_height / height * width)
    else:
        sides = round(own_width / width * height), own_width
    top, left = round((own_height - sides[0]) / 2.0), round((own_width - sides[1]) / 2.0)
    return (top, left), (top + sides[0], left + sides[1])


@dataclass(frozen=True)
class CogVideoXAutoencoder(Autoencoder):
    """The causal video VAE of CogVideoX, with one scale for all channels.

    Its config's ``invert_scale_latents`` is of the pictures that 1.5's image to video is given, and of nothing here.

    Attributes:
        spatial: pixels along a latent's side.
        temporal: frames to a latent's, after the first of an odd number.
        scaling: what the VAE's latents are multiplied by for the denoiser.
    """

    class_name: ClassVar[str] = "AutoencoderKLCogVideoX"
    spatial: int = 8
    temporal: int = 4
    scaling: float = 1.15258426

    @classmethod
    def read(cls, config: Mapping[str, Any], channels: int) -> Self:
        """Read the levels, the scale, and ``temporal_compression_ratio``."""
        usual = {"latent_channels": 16, "scaling_factor": cls.scaling, "block_out_channels": (128, 256, 256, 512)}
        picture = ImageAutoencoder.read({**usual, **config, "shift_factor": None}, channels)
        temporal = whole({"temporal_compression_ratio": cls.temporal, **config}, "temporal_compression_ratio")
        return cls(picture.spatial, temporal, picture.scaling)

    def frames(self, latent_frames: int) -> int:
        """Return how many frames come of latents: of an odd number the first stands alone."""
        return self.temporal * latent_frames if latent_frames % 2 == 0 else super().frames(latent_frames)

    def decode_pixels(self, network: Any, latents: Tensor) -> Tensor:
        """Return frames of latents."""
        frames = network.decode(latents.to(network.dtype) / self.scaling, return_dict=False)[0]
        return at_least_float32(frames).transpose(1, 2)

    @torch.no_grad()
    def encode_pixels(self, network: Any, frames: Tensor) -> Tensor:
        """Return latents of frames."""
        latents = network.encode(frames.transpose(1, 2).to(network.dtype)).latent_dist.mode()
        return at_least_float32(latents * self.scaling)


class CogVideoXFamily(VariancePreservingFamily):
    """CogVideoX 1.0 (2b, 5b) and 1.5 (5b), text to video, by prompts encoded beforehand or by text.

    Columns: ``prompt_embeds`` [L, D] and ``negative_prompt_embeds`` [L, D], both of one length (226), since the network
    sees the padding. The default ``latent_shape`` is of 49 frames of 480 x 720. 1.5 takes an even number of latent
    frames, the first of which is padding, as in diffusers' pipeline, and is not decoded.
    """

    name: ClassVar[str] = "cogvideox"
    pipeline_class: ClassVar[str] = "CogVideoXPipeline"
    network_class: ClassVar[str] = "CogVideoXTransformer3DModel"
    denoiser = CogVideoXDenoiser
    autoencoder = CogVideoXAutoencoder
    widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "text_embed_dim"}
    process: ClassVar[Mapping[str, Any]] = {
        **PROCESS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {**VariancePreservingFamily.defaults, "latent_shape": [16, 13, 60, 90]}
    sampler_hint: ClassVar[str] = (
        "they lie evenly (no method.timestep_shift), and their number divides the process' steps (1, 2, 4, 5, 8 ...)"
    )
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    condition_columns = ["prompt_embeds", "negative_prompt_embeds"]

    @property
    def _process(self) -> Mapping[str, Any]:
        return {**PROCESS, **super()._process}

    @cached_property
    def patches(self) -> tuple[int, int, int]:
        """Latents of a token along frames, height and width."""
        _, height, width = super().patches
        return self.network_config.get("patch_size_t") or 1, height, width

    def _wrap(self, network: Any) -> PretrainedDenoiser:
        return CogVideoXDenoiser(network, self.schedule)

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the column, of as many tokens as the network has places for."""
        tokens = self.network_config.get("max_text_seq_length", 226)
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=tokens)
        return {"prompt_embeds": embeds.float().cpu().numpy()}

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the prompts' width and length against the transformer's; `check_teacher` has been called."""
        super().check_conditions(conditions)
        tokens, places = conditions["prompt_embeds"].shape[1], self._config.max_text_seq_length
        if tokens != places:
            raise UserError(f"prompts: column 'prompt_embeds' has {tokens} tokens a row, but the teacher takes "
                            f"{places}: pad it with the text encoder's own padding")  # fmt: skip

    # The pipeline of a student.

    def student_samplers(self, times: Sequence[float]) -> list[Sampler]:
        """Return DDIM's steps by the pipeline's own scheduler: T / n timesteps each, from the last of T on.

        The pipeline takes times of others, but its schedulers do not.
        """
        config = {key: self._process[key] for key in SHIFTED if key in self._process}
        call = {"num_inference_steps": len(times) - 1}
        return [Sampler("CogVideoXDDIMScheduler", {**config, "timestep_spacing": "trailing"}, call)]

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Return latents with their frames before their channels."""
        return latents.transpose(1, 2)

    # Pictures: 1.5's first latent frame is padding.

    @property
    def _padding(self) -> int:
        return 1 if self.patches[0] > 1 and self.latent_shape[1] > 1 else 0

    @property
    def frames(self) -> int:
        """Frames of a sample, by the VAE's compression in time."""
        return self.vae.frames(self.latent_shape[1] - self._padding)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Three channels and the picture's sides, where a sample is of one frame and not padded.

        Raises:
            UserError: samples are videos or padded, or there is no VAE.
        """
        if self._padding:
            raise UserError("family 'cogvideox' does not encode pictures into latents that 1.5 pads with a frame")
        return super().picture_shape

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Return pixels [B, F, 3, H, W] by the VAE beside the network."""
        return super().to_pixels(with_frames(latents)[:, :, self._padding :])

    def decode_video(self, latents: Tensor) -> Tensor:
        """Return frames [B, F, 3, H, W] in [0, 1], by the VAE; without one, the latents' first three channels."""
        return super().decode_video(with_frames(latents)[:, :, self._padding :])

    def _check_latent_shape(self) -> None:
        if len(self.latent_shape) != 4:
            raise UserError(f"teacher.options.latent_shape: [C, frames, H, W], not {list(self.latent_shape)}")

    def _check_config(self, config: Any) -> None:
        shape, patches = self.latent_shape, (config.patch_size_t or 1, config.patch_size, config.patch_size)
        for key in ("ofs_embed_dim", "use_learned_positional_embeddings"):
            if config.get(key):
                raise UserError(f"teacher.path: the transformer in '{self.path}' has {key} (image to video); family "
                                f"'cogvideox' takes text to video's")  # fmt: skip
        if config.in_channels != config.out_channels:
            raise UserError(f"teacher.path: the transformer in '{self.path}' takes {config.in_channels} channels and "
                            f"gives {config.out_channels} (image to video); family 'cogvideox' takes text to video's"
                            )  # fmt: skip
        if config.in_channels != shape[0]:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {config.in_channels} channels, not "
                            f"{shape[0]}")  # fmt: skip
        if any(size % patch for size, patch in zip(shape[1:], patches, strict=True)):
            raise UserError(f"teacher.options.latent_shape: {list(shape[1:])} is not divisible by the teacher's "
                            f"patches {list(patches)}")  # fmt: skip
        self._check_places(shape, "teacher.options.latent_shape")

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the latents of a picture of another size; 1.5's network has places up to its own size."""
        shape = super().shape_for(width, height)
        self._check_places(shape, "sizes")
        return shape

    def _check_places(self, shape: tuple[int, ...], key: str) -> None:
        """Refuse latents that 1.5's network has no positions for."""
        own = tuple(self.network_config.get(name, size) for name, size in (("sample_height", 60), ("sample_width", 90)))
        if self.patches[0] > 1 and any(size > most for size, most in zip(shape[-2:], own, strict=True)):
            raise UserError(f"{key}: latents of {list(shape[-2:])} are larger than the teacher's positions, "
                            f"{list(own)}")  # fmt: skip
