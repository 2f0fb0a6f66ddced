"""What the families of diffusers' pretrained networks share: loading, prompt embeddings, decoding with the VAE."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raydmd.diffusion.schedule import RectifiedFlow, Schedule
from raydmd.errors import UserError, nearest
from raydmd.models.base import IMAGE_COLUMN, Conditions, Denoiser, Family, require_column
from raydmd.models.diffusers.autoencoder import Autoencoder, decoding_dtype
from raydmd.models.diffusers.config_files import read_config
from raydmd.models.diffusers.denoiser import PretrainedDenoiser, checkpoint, with_frames
from raydmd.models.diffusers.hub import HUB
from raydmd.models.diffusers.loading import ENCODER, load_model, load_text_pipeline
from raydmd.models.diffusers.sampler_grid import sampler_grid
from raydmd.models.diffusers.student_sampler import SampledByDiffusers
from raydmd.models.diffusers.teacher_folder import ALONE, CONFIG, TeacherFolder, find_teacher
from raydmd.models.diffusers.teacher_lora import fuse_teacher_lora, lora_files, read_lora
from raydmd.models.diffusers.weight_files import (
    check_same_config,
    check_weights,
    meta_network,
    read_json,
    variant_of,
    weight_files,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEGATIVE = "negative_"  # before the name of a column of the null prompt


class Grid(Protocol):
    """The law of the times that a teacher's own sampler visits."""

    def times(self, steps: int, tokens: int) -> list[float]:
        """Return the ``steps`` + 1 falling times, ending in 0, for a sample of ``tokens`` tokens."""
        ...


class PretrainedFamily(SampledByDiffusers, Family):
    """A family whose teacher is a diffusers model: a pipeline's folder, the network's own, or ``hf://owner/name``.

    What a network's kind decides, its family's file says: the classes, the process (`schedule`, ``prediction``), the
    VAE, the patches, the conditions. Without more it is a rectified flow. Options:

    - ``latent_shape``: of one sample;
    - ``dtype``: of the frozen weights (float32, bfloat16, float16); LoRA weights are float32 always;
    - ``subfolder``: of the network in a pipeline's folder; given, it is the teacher alone, without a second one;
    - ``variant``: of the weights' files, e.g. ``fp16``;
    - ``negative_prompt``: the null prompt's text, where prompts are encoded as they come;
    - ``null_prompt``: whether prompts come with the null prompt's columns; not needed at a guidance scale of 1;
    - ``gradient_checkpointing``: recompute blocks in the backward pass, for memory.
    """

    pipeline_class: ClassVar[str]
    network_class: ClassVar[str]
    denoiser: ClassVar[type[PretrainedDenoiser]]
    autoencoder: ClassVar[type[Autoencoder]]
    widths: ClassVar[Mapping[str, str]]  # of columns of the prompts: the key of the network's config that says it
    patch: ClassVar[tuple[int, int, int]] = (1, 2, 2)  # as `patches`, where the network's config is not there or silent
    text_tokens: ClassVar[int | None] = None  # of a prompt, that its one text encoder reads; None: not told
    gives_sigmas: ClassVar[bool] = False  # whether the pipeline gives its scheduler sigmas and mu
    gives_mu: ClassVar[bool] = False  # whether it gives mu without sigmas
    optional_encoders: ClassVar[tuple[str, ...]] = ()  # parts that encode prompts, and that the pipeline can do without
    defaults: ClassVar[Mapping[str, Any]] = {
        "latent_shape": None, "dtype": "float32", "subfolder": "transformer", "negative_prompt": "",
        "gradient_checkpointing": False, "variant": "", "null_prompt": True,
    }  # fmt: skip
    meanings: ClassVar[Mapping[str, str]] = {
        "latent_shape": "of a sample's latents: channels, frames of a video, height, width; it sets the picture's size",
        "dtype": "of the frozen weights: float32, bfloat16 or float16",
        "subfolder": "of the network in the pipeline's folder",
        "negative_prompt": "the null prompt's text, which guidance goes away from",
        "gradient_checkpointing": "compute activations again in the backward pass: less memory, more time",
        "variant": "of the weights' files, e.g. fp16; empty: of none",
        "null_prompt": "whether the prompts carry the null prompt, which guidance above 1 needs",
    }

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        shape = self.options["latent_shape"]
        if not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise UserError(f"teacher.options.latent_shape: a list of sizes is needed, not {shape}")
        self.latent_shape = tuple(shape)
        self._check_latent_shape()
        if self.options["dtype"] not in DTYPES:
            dtype = self.options["dtype"]
            raise UserError(f"teacher.options.dtype: no '{dtype}'{nearest(dtype, DTYPES)}")
        self._lora: str | None = None
        self._snapshot: TeacherFolder | None = None
        self._vae: Any = None
        self._pipeline: Any = None  # text encoder and tokenizer alone
        self._null: dict[str, np.ndarray] = {}
        if not self.options.get("null_prompt", True):
            self.condition_columns = [name for name in self.condition_columns if not name.startswith(NEGATIVE)]

    # What a family's file may say otherwise.

    @cached_property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The process that the network was trained on."""
        return RectifiedFlow()

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The pipelines that the family runs as they are made."""
        return (self.pipeline_class,)

    def _check_latent_shape(self) -> None:
        """Refuse a latent shape that the network cannot take."""

    def _check_config(self, config: Any) -> None:
        """Refuse a network, by its config, that the family would run otherwise, or with other latents."""

    def _wrap(self, network: Any) -> PretrainedDenoiser:
        """Put the loaded network behind the protocol."""
        return self.denoiser(network)

    def _wrap_two(self, high: Any, low: Any, boundary: float) -> PretrainedDenoiser:
        """Put a pipeline's two loaded networks behind the protocol.

        Raises:
            UserError: the family takes but one.
        """
        raise UserError(f"teacher.path: {self._root()} has two transformers, and family '{self.name}' takes one; "
                        f"{ALONE}")  # fmt: skip

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return ``prompt_embeds`` [B, L, D], float32, and what belongs to it."""
        raise NotImplementedError

    def _encode_null(self, pipeline: Any) -> dict[str, np.ndarray]:
        """Return the same of the null prompt, for one row."""
        return self._encode(pipeline, [self.options["negative_prompt"]])

    def _read_grid(self, config: Mapping[str, Any]) -> Grid:
        """Read the law of its own sampler's times from its scheduler_config.json."""
        return sampler_grid(config, sigmas_given=self.gives_sigmas, mu_given=self.gives_mu)

    # The network.

    def use_lora(self, path: str) -> None:
        """Have a LoRA fused into the network when it is loaded."""
        self._lora = path

    def load_teacher(self) -> Denoiser:
        """Load the frozen network, or both of two, with diffusers' ``from_pretrained``.

        Raises:
            UserError: what `check_teacher` refuses.
        """
        self.check_teacher()
        variant, dtype = self.options["variant"] or None, DTYPES[self.options["dtype"]]
        folders = self.teacher_folder().networks
        networks = [load_model(self.network_class, folder, variant, dtype) for folder in folders]
        if self._lora is not None:
            (network,) = networks
            fuse_teacher_lora(network, read_lora(self._lora, self.pipeline_class, self.denoiser.component, network))
        denoiser = self._assemble(networks)
        denoiser.requires_grad_(False).eval()
        if self.options["gradient_checkpointing"]:
            denoiser.checkpoint_activations(checkpoint)
        return denoiser

    def outline(self) -> Denoiser:
        """Return the network of the config on the meta device."""
        return self._assemble([self._meta_network(folder) for folder in self.teacher_folder().networks])

    def _assemble(self, networks: Sequence[Any]) -> PretrainedDenoiser:
        if len(networks) == 1:
            return self._wrap(networks[0])
        high, low = networks
        return self._wrap_two(high, low, self.teacher_folder().boundary())

    def check_teacher(self) -> None:
        """Refuse a folder that would not be used whole, or does not fit, by its configs and its weights' headers.

        Raises:
            UserError: ``teacher...: ...``, also where there is no path.
        """
        folder, variant = self.teacher_folder(), self.options["variant"]
        folder.check_pipeline(self.name, self.pipelines)
        if folder.both:
            folder.boundary()
        networks = [self._meta_network(path) for path in folder.networks]
        self._assemble(networks)
        self._config = networks[0].config
        self._check_config(self._config)
        for path, network in zip(folder.networks[1:], networks[1:], strict=True):
            check_same_config(path / CONFIG, network.config, self._config)
        folder.fetch_weights(variant)
        for path, network in zip(folder.networks, networks, strict=True):
            check_weights(path, weight_files(path, variant), network)
        if self._lora is not None:
            if folder.both:
                raise UserError("teacher.lora: it is of one network, and the teacher has two; take one alone by "
                                "teacher.options.subfolder, or a folder that the LoRAs are fused into")  # fmt: skip
            read_lora(self._lora, self.pipeline_class, self.denoiser.component, networks[0])

    def _meta_network(self, folder: Path) -> Any:
        import diffusers

        file = folder / CONFIG
        if (found := read_json(file).get("_class_name")) != self.network_class:
            raise UserError(f"teacher.path: {file} is of a {found}; family '{self.name}' needs a "
                            f"{self.network_class}")  # fmt: skip
        return meta_network(file, getattr(diffusers, self.network_class))

    @cached_property
    def network_config(self) -> Mapping[str, Any]:
        """The network's config.json; empty where there is none yet."""
        if self.path is None:
            return {}
        return read_config(self._root(), self.options["subfolder"]) or read_config(self._root(), "") or {}

    @cached_property
    def scheduler_config(self) -> Mapping[str, Any] | None:
        """The scheduler_config.json beside the network; None where there is none."""
        return None if self.path is None else read_config(self._root(), "scheduler", "scheduler_config.json")

    # Where it lies.

    def teacher_folder(self) -> TeacherFolder:
        """Return where the teacher lies on this machine.

        Raises:
            UserError: no path, or nothing there.
        """
        if self.path is None:
            raise UserError(f"teacher.path: family '{self.name}' needs the teacher's folder, or {HUB}owner/name")
        found = self._snapshot or find_teacher(self.path, self.options["subfolder"], "subfolder" in self.given)
        self._snapshot = None if found.hub is None else found  # the hub is asked once
        return found

    def teacher_files(self) -> dict[str, Path]:
        """Return the networks' configs and weights, a LoRA's, and what of the pipeline training depends on."""
        folder = self.teacher_folder()
        folder.fetch_weights(self.options["variant"])
        lora = {} if self._lora is None else lora_files(self._lora)
        return {**folder.files(self.options["variant"]), **lora}

    def teacher_revision(self) -> str | None:
        """Return the hub's commit, of a teacher from there."""
        hub = self.teacher_folder().hub
        return None if hub is None else hub.revision

    def _has_part(self, part: str) -> bool:
        """Whether the pipeline's folder has a part beside the network."""
        return (self._root() / part / CONFIG).is_file()

    def _root(self) -> Path:
        """Return the pipeline's folder, which need not have a network."""
        assert self.path is not None
        return self.teacher_folder().root if self.path.startswith(HUB) else Path(self.path)

    def _fetch(self, *patterns: str) -> None:
        """Have parts of the pipeline here, where it is the hub's."""
        if self.path is not None and self.path.startswith(HUB):
            self.teacher_folder().fetch(patterns)

    # Prompts.

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return the prompts' embeddings [B, L, D] and, where given, the null prompt's.

        Columns with a mask are padded with zeros, and masked, to one length.
        """
        conditions = {name: self._embeddings(rows, name) for name in self.condition_columns if name in rows}
        for name in self.widths:
            require_column(rows, name)
        masked = [name for name in conditions if f"{name}_mask" in self.condition_columns]
        length = max((conditions[name].shape[1] for name in masked), default=0)
        for name in masked:
            mask = f"{name}_mask"
            require_column(rows, mask)
            if conditions[mask].shape != conditions[name].shape[:2]:
                raise UserError(f"prompts: column '{mask}' is {list(conditions[mask].shape)}, but '{name}' "
                                f"{list(conditions[name].shape)}")  # fmt: skip
            extra = length - conditions[name].shape[1]
            conditions[name] = F.pad(conditions[name], (0, 0, 0, extra))
            conditions[mask] = F.pad(conditions[mask], (0, extra))
        for name, null in conditions.items():
            own = conditions.get(name.removeprefix(NEGATIVE))
            if own is not None and own.shape != null.shape:
                raise UserError(f"prompts: '{name}' is {list(null.shape)} and '{name.removeprefix(NEGATIVE)}' "
                                f"{list(own.shape)}; pad both with zeros to one length")  # fmt: skip
        return conditions

    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return the same with the null prompt in the prompt's place; what has no null stays.

        Raises:
            UserError: the prompts came without it.
        """
        if not self.options.get("null_prompt", True):
            raise UserError("teacher.options.null_prompt: guidance (teacher.guidance_scale other than 1) needs the "
                            "null prompt; set it to true")  # fmt: skip
        nulls = [name for name in self.condition_columns if name.startswith(NEGATIVE)]
        if missing := [name for name in nulls if name not in conditions]:
            raise UserError(f"prompts: guidance needs the null prompt in column '{missing[0]}'")
        return {**conditions, **{name.removeprefix(NEGATIVE): conditions[name] for name in nulls}}

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the prompts' widths against the network's; `check_teacher` has been called."""
        for column, key in self.widths.items():
            width = self._config[key]
            for name in (column, f"{NEGATIVE}{column}"):
                if name in conditions and conditions[name].shape[-1] != width:
                    raise UserError(f"prompts: column '{name}' is of width {conditions[name].shape[-1]}, but the "
                                    f"teacher takes {width}")  # fmt: skip

    def _embeddings(self, rows: Mapping[str, np.ndarray], name: str) -> Tensor:
        """Return one column as a tensor: masks [B, L] bool, all else float32."""
        values = rows[name]
        if name.endswith("_mask"):
            return torch.from_numpy(values.astype(bool))
        pooled = "pooled" in name
        if values.dtype.kind != "f" or (values.ndim != 2 if pooled else values.ndim < 3):
            form = "an embedding [width]" if pooled else "embeddings [tokens, width]"
            raise UserError(f"prompts: column '{name}' needs {form}, not {list(values.shape[1:])} {values.dtype}")
        with np.errstate(over="ignore"):  # a value that float32 cannot hold is refused by whoever has the row's number
            return torch.from_numpy(values.astype(np.float32))

    @property
    def reads_text(self) -> bool:
        """Whether there is a text encoder beside the network."""
        return self.path is not None and self._has_part("text_encoder")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
        """Return the columns of some texts and of ``negative_prompt``, as diffusers' own pipeline encodes them.

        Args:
            prompts: the texts.
            device: to which the text encoder is moved.

        Raises:
            UserError: the teacher's folder has no text encoder, or one that cannot be loaded.
        """
        if self._pipeline is None:
            self._pipeline = self._load_text_pipeline()
        pipeline = self._pipeline.to(device)
        if not self._null and self.options.get("null_prompt", True):
            self._null = {f"{NEGATIVE}{name}": rows for name, rows in self._encode_null(pipeline).items()}
        null = {name: np.repeat(rows, len(prompts), axis=0) for name, rows in self._null.items()}
        return {**self._encode(pipeline, list(prompts)), **null}

    def check_encoder(self, key: str) -> None:
        """Refuse texts where the teacher's folder has no text encoder beside the network."""
        if self.path is None or not self._has_part("text_encoder"):
            raise UserError(f"{key}: it holds texts, and the teacher '{self.path}' has no text_encoder/{CONFIG} to "
                            f"encode them with")  # fmt: skip
        if IMAGE_COLUMN in self.condition_columns:
            self.check_pixels(key)

    def encoder_files(self) -> dict[str, Path]:
        """Return the configs and weights of all text encoders and tokenizers; with pictures, the VAE's, too."""
        self.check_encoder("teacher.path")
        patterns = [*ENCODER, "vae/*"] if IMAGE_COLUMN in self.condition_columns else [*ENCODER]
        self._fetch(*patterns)
        root = self._root()
        found = [file for pattern in patterns for file in root.glob(pattern) if file.is_file()]
        return {file.relative_to(root).as_posix(): file for file in found if not file.name.startswith(".")}

    def cut_prompts(self, prompts: Sequence[str]) -> int | None:
        """Return how many texts have more tokens than `text_tokens`, by the pipeline's tokenizer."""
        if self.text_tokens is None:
            return None
        if self._pipeline is None:
            self._pipeline = self._load_text_pipeline()
        read = self._pipeline.tokenizer(list(prompts)).input_ids
        return sum(len(tokens) > self.text_tokens for tokens in read)

    def _load_text_pipeline(self) -> Any:
        if self.path is None or not self._has_part("text_encoder"):
            raise UserError(f"teacher.path: '{self.path}' has no text_encoder/config.json to encode prompts with")
        self._fetch(*ENCODER)
        dtype, variant = DTYPES[self.options["dtype"]], self.options["variant"]
        absent = [part for part in self.optional_encoders if not self._has_part(part)]
        return load_text_pipeline(self.pipeline_class, self._root(), variant, dtype, absent)

    # Pictures.

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

    # The teacher's own sampler.

    def teacher_times(
        self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None
    ) -> list[float]:
        """Return the times of the teacher's own sampler: without ``shift``, those of its scheduler_config.json."""
        grid = self.sampler_grid if shift is None else None
        if grid is None:
            return super().teacher_times(steps, shift, shape)
        return grid.times(steps, self._tokens(shape or self.latent_shape))

    @cached_property
    def sampler_grid(self) -> Grid | None:
        """The law of its own sampler's times; None where there is no scheduler beside the network.

        Raises:
            UserError: the scheduler is one that is not followed here.
        """
        config = self.scheduler_config
        return None if config is None else self._read_grid(config)

    def _tokens(self, shape: tuple[int, ...]) -> int:
        """Return how many tokens the network makes of a frame of latents of a shape."""
        return shape[-2] // self.patches[1] * (shape[-1] // self.patches[2])
