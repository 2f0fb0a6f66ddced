"""What the families of diffusers' pretrained networks share: loading, prompt embeddings, decoding with the VAE."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raydmd.diffusion.schedule import RectifiedFlow
from raydmd.errors import UserError, nearest
from raydmd.models.base import Conditions, Denoiser, Family, one_line, require_column
from raydmd.models.diffusers.config_files import read_config
from raydmd.models.diffusers.hub import HUB
from raydmd.models.diffusers.sampler_grid import SamplerGrid, sampler_grid
from raydmd.models.diffusers.teacher_folder import CONFIG, TeacherFolder, find_teacher
from raydmd.models.diffusers.vae import VaeConfig, decode_latents, decode_pixels, decoding_dtype, vae_config
from raydmd.models.diffusers.weight_files import check_weights, meta_network, read_json, variant_of, weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATCHES = (1, 2, 2)  # latents of a token along frames, height and width, where there is no transformer yet
ENCODER = ("text_encoder*/*", "tokenizer*/*", "processor/*")  # a pipeline's parts that encode prompts


class PretrainedDenoiser(Denoiser):
    """A diffusers transformer behind the protocol.

    Its parameters' names start with ``transformer.``, as those in diffusers' LoRA files do.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = transformer

    def checkpoint_activations(self, run: Callable[..., Any]) -> bool:
        """Recompute each transformer block in the backward pass, through ``run(block, *args)``."""
        self.transformer.enable_gradient_checkpointing(run)
        return True

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return bool(self.transformer.gradient_checkpointing)


class PretrainedFamily(Family):
    """A family whose teacher is a diffusers model: a pipeline's folder, the transformer's own, or ``hf://owner/name``.

    Rectified flow, flow prediction. Options:

    - ``latent_shape``: of one sample;
    - ``dtype``: of the frozen weights (float32, bfloat16, float16); LoRA weights are float32 always;
    - ``subfolder``: of the transformer in a pipeline's folder;
    - ``variant``: of the weights' files, e.g. ``fp16``;
    - ``negative_prompt``: the null prompt's text, where prompts are encoded as they come;
    - ``gradient_checkpointing``: recompute blocks in the backward pass, for memory.
    """

    pipeline_class: ClassVar[str]
    text_width: ClassVar[str]  # the config's key of it
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    gives_sigmas: ClassVar[bool] = False  # whether the pipeline gives its scheduler sigmas and mu
    defaults: ClassVar[Mapping[str, Any]] = {
        "latent_shape": None, "dtype": "float32", "subfolder": "transformer", "negative_prompt": "",
        "gradient_checkpointing": False, "variant": "",
    }  # fmt: skip

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
        self.schedule = RectifiedFlow()
        self._snapshot: TeacherFolder | None = None
        self._vae: Any = None
        self._pipeline: Any = None  # text encoder and tokenizer alone
        self._null: dict[str, np.ndarray] = {}

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The pipelines that the family runs as they are made."""
        return (self.pipeline_class,)

    def _check_latent_shape(self) -> None:
        """Refuse a latent shape that the network cannot take."""

    def _check_config(self, config: Any) -> None:
        """Refuse a transformer, by its config, that the family would run otherwise, or with other latents."""

    def _wrap(self, transformer: Any) -> PretrainedDenoiser:
        """Put the loaded transformer behind the protocol."""
        raise NotImplementedError

    def load_teacher(self) -> Denoiser:
        """Load the frozen transformer with diffusers' ``from_pretrained``.

        Raises:
            UserError: what `check_teacher` refuses.
        """
        self.check_teacher()
        folder = self.teacher_folder().transformer
        network = self._wrap(self._from_pretrained(self.transformer_class, folder, self.options["variant"] or None))
        network.requires_grad_(False).eval()
        if self.options["gradient_checkpointing"]:
            network.checkpoint_activations(checkpoint)
        return network

    def outline(self) -> Denoiser:
        """Return the transformer of the config on the meta device."""
        import diffusers

        file = self.teacher_folder().transformer / CONFIG
        return self._wrap(meta_network(file, getattr(diffusers, self.transformer_class)))

    def check_teacher(self) -> None:
        """Refuse a folder that would not be used whole, or does not fit, by its configs and its weights' headers.

        Raises:
            UserError: ``teacher...: ...``, also where there is no path.
        """
        import diffusers

        folder = self.teacher_folder()
        folder.check_pipeline(self.name, self.pipelines, alone="subfolder" in self.given)
        file = folder.transformer / CONFIG
        if (found := read_json(file).get("_class_name")) != self.transformer_class:
            raise UserError(f"teacher.path: {file} is of a {found}; family '{self.name}' needs a "
                            f"{self.transformer_class}")  # fmt: skip
        network = meta_network(file, getattr(diffusers, self.transformer_class))
        self._config = network.config
        self._check_config(network.config)
        folder.fetch_weights(self.options["variant"])
        files = weight_files(folder.transformer, self.options["variant"])
        check_weights(folder.transformer, files, network)

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the prompts' width against the transformer's; `check_teacher` has been called."""
        width = self._config[self.text_width]
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if name in conditions and conditions[name].shape[-1] != width:
                raise UserError(f"prompts: column '{name}' is of width {conditions[name].shape[-1]}, but the teacher "
                                f"takes {width}")  # fmt: skip

    def teacher_folder(self) -> TeacherFolder:
        """Return where the teacher lies on this machine.

        Raises:
            UserError: no path, or nothing there.
        """
        if self.path is None:
            raise UserError(f"teacher.path: family '{self.name}' needs the teacher's folder, or {HUB}owner/name")
        found = self._snapshot or find_teacher(self.path, self.options["subfolder"])
        self._snapshot = None if found.hub is None else found  # the hub is asked once
        return found

    def teacher_files(self) -> dict[str, Path]:
        """Return the transformer's config and weights, and what of the pipeline training depends on."""
        folder = self.teacher_folder()
        folder.fetch_weights(self.options["variant"])
        return folder.files(weight_files(folder.transformer, self.options["variant"]))

    def teacher_revision(self) -> str | None:
        """Return the hub's commit, of a teacher from there."""
        hub = self.teacher_folder().hub
        return None if hub is None else hub.revision

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return the prompts' embeddings [B, L, D] and, where given, the null prompt's."""
        conditions = {name: self._embeddings(rows, name) for name in self.condition_columns if name in rows}
        require_column(rows, "prompt_embeds")
        return conditions

    @property
    def reads_text(self) -> bool:
        """Whether there is a text encoder beside the transformer."""
        return self.path is not None and self._has_part("text_encoder")

    def _has_part(self, part: str) -> bool:
        """Whether the pipeline's folder has a part beside the transformer."""
        return (self._root() / part / CONFIG).is_file()

    def _root(self) -> Path:
        """Return the pipeline's folder, which need not have a transformer."""
        assert self.path is not None
        return self.teacher_folder().root if self.path.startswith(HUB) else Path(self.path)

    def _fetch(self, *patterns: str) -> None:
        """Have parts of the pipeline here, where it is the hub's."""
        if self.path is not None and self.path.startswith(HUB):
            self.teacher_folder().fetch(patterns)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
        """Return the columns of some texts and of ``negative_prompt``, as diffusers' own pipeline encodes them.

        Args:
            prompts: the texts.
            device: to which the text encoder is moved.

        Raises:
            UserError: the teacher's folder has no text encoder, or one that cannot be loaded.
        """
        pipeline = self._load_pipeline().to(device)
        if not self._null:
            null = self._encode(pipeline, [self.options["negative_prompt"]])
            self._null = {f"negative_{name}": rows for name, rows in null.items()}
        null = {name: np.repeat(rows, len(prompts), axis=0) for name, rows in self._null.items()}
        return {**self._encode(pipeline, list(prompts)), **null}

    def _encode(self, pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
        """Return ``prompt_embeds`` [B, L, D], float32, and what belongs to it."""
        raise NotImplementedError

    def check_pixels(self, key: str) -> None:
        """Refuse a teacher without a VAE."""
        if self.path is None or not self._has_part("vae"):
            raise UserError(f"{key}: the teacher '{self.path}' has no VAE (vae/{CONFIG}), without which there are no "
                            f"pixels")  # fmt: skip

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Return pixels [B, F, 3, H, W] by the VAE beside the transformer, which is frozen.

        Raises:
            UserError: there is none.
        """
        if (vae := self._load_vae()) is None:
            self.check_pixels("teacher.path")
        return decode_pixels(vae.to(latents.device), self.vae_config, _with_frames(latents))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures [B, 3, H, W] in [0, 1] (a video's middle frame), by the VAE beside the transformer.

        Without a VAE, the latents' first three channels are shown, each sample scaled to [0, 1].
        """
        if latents.ndim == 5 and self._load_vae() is None:
            middle = latents.shape[2] // 2
            latents = latents[:, :, middle : middle + 1]
        frames = self.decode_video(latents)
        return frames[:, frames.shape[1] // 2]

    def decode_video(self, latents: Tensor) -> Tensor:
        """Return frames [B, F, 3, H, W] in [0, 1], by the VAE; without one, the latents' first three channels."""
        latents, vae = _with_frames(latents), self._load_vae()
        if vae is None:
            shown = latents[:, :3].float()
            low, high = shown.amin((1, 2, 3, 4), keepdim=True), shown.amax((1, 2, 3, 4), keepdim=True)
            return ((shown - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1, -1).transpose(1, 2)
        return decode_latents(vae.to(latents.device), self.vae_config, latents)

    @cached_property
    def vae_config(self) -> VaeConfig:
        """The VAE's factors and statistics; those of Qwen-Image's and Wan 2.1's factors where there is none.

        Raises:
            UserError: the VAE is of another kind, or for latents of other channels.
        """
        config = None if self.path is None else read_config(self._root(), "vae")
        return VaeConfig() if config is None else vae_config(config, self.latent_shape[0])

    @cached_property
    def patches(self) -> tuple[int, int, int]:
        """Latents of a token along frames, height and width, by the transformer's config.

        Raises:
            UserError: the config's ``patch_size`` is not one.
        """
        config = None
        if self.path is not None:
            config = read_config(self._root(), self.options["subfolder"]) or read_config(self._root(), "")
        size = (config or {}).get("patch_size", PATCHES)
        sizes = (1, size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
        if len(sizes) != len(PATCHES) or not all(type(n) is int and n > 0 for n in sizes):
            raise UserError(f"teacher.path: the transformer's config.json has patch_size {size!r}, not whole numbers")
        return sizes

    @property
    def frames(self) -> int:
        """Frames of a sample, by the VAE's compression in time."""
        return self.vae_config.frames(self.latent_shape[1]) if len(self.latent_shape) == 4 else 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a picture of ``latent_shape``, in pixels, by the VAE's factor."""
        spatial = self.vae_config.spatial
        return spatial * self.latent_shape[-1], spatial * self.latent_shape[-2]

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the latents of a picture of another size.

        Raises:
            UserError: a side that the VAE or the network's patches do not divide.
        """
        spatial, (_, high, wide) = self.vae_config.spatial, self.patches
        if width % (spatial * wide) or height % (spatial * high):
            sides = f"{spatial * wide}" if wide == high else f"{spatial * wide} and {spatial * high}"
            raise UserError(f"sizes: {width}x{height} is not of sides that {sides} divides")
        return (*self.latent_shape[:-2], height // spatial, width // spatial)

    def teacher_times(
        self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None
    ) -> list[float]:
        """Return the times of the teacher's own sampler: without ``shift``, those of its scheduler_config.json."""
        grid = self.sampler_grid if shift is None else None
        if grid is None:
            return super().teacher_times(steps, shift, shape)
        return grid.times(steps, self._tokens(shape or self.latent_shape))

    @cached_property
    def sampler_grid(self) -> SamplerGrid | None:
        """The law of its own sampler's times; None where there is no scheduler beside the transformer.

        Raises:
            UserError: the scheduler is one that is not followed here.
        """
        config = None if self.path is None else read_config(self._root(), "scheduler", "scheduler_config.json")
        return None if config is None else sampler_grid(config, sigmas_given=self.gives_sigmas)

    def _tokens(self, shape: tuple[int, ...]) -> int:
        """Return how many tokens the network makes of latents of a shape."""
        return shape[-2] // self.patches[1] * (shape[-1] // self.patches[2])

    def _embeddings(self, rows: Mapping[str, np.ndarray], name: str) -> Tensor:
        """Return one column as a tensor: masks [B, L] bool, all else float32."""
        values = rows[name]
        if name.endswith("_mask"):
            return torch.from_numpy(values.astype(bool))
        if values.dtype.kind != "f" or values.ndim < 3:
            shape = list(values.shape[1:])
            raise UserError(f"prompts: column '{name}' needs embeddings [tokens, width], not {shape} {values.dtype}")
        with np.errstate(over="ignore"):  # a value that float32 cannot hold is refused by whoever has the row's number
            return torch.from_numpy(values.astype(np.float32))

    def _load_vae(self) -> Any:
        if self._vae is None and self.path is not None:
            if self._has_part("vae"):
                self._fetch("vae/*")
                folder, dtype = self._root() / "vae", decoding_dtype(DTYPES[self.options["dtype"]])
                variant = variant_of(folder, self.options["variant"])
                self._vae = self._from_pretrained(self.vae_class, folder, variant, dtype).requires_grad_(False).eval()
        return self._vae

    def _load_pipeline(self) -> Any:
        """Return the teacher's pipeline with nothing in it but what encodes prompts."""
        import diffusers

        if self._pipeline is None:
            if self.path is None or not self.reads_text:
                raise UserError(f"teacher.path: '{self.path}' has no text_encoder/config.json to encode prompts with")
            kind = getattr(diffusers, self.pipeline_class)
            without: dict[str, Any] = {name: None for name in ("transformer", "transformer_2", "vae", "scheduler")
                       if name in inspect.signature(kind).parameters}  # fmt: skip
            dtype = DTYPES[self.options["dtype"]]
            try:
                self._fetch(*ENCODER)
                root = self._root()
                without["variant"] = variant_of(root / "text_encoder", self.options["variant"])
                self._pipeline = kind.from_pretrained(root, torch_dtype=dtype, use_safetensors=True, **without)
            except (OSError, ValueError, RuntimeError, AttributeError) as error:
                raise UserError(f"teacher.path: cannot load the text encoder of '{self.path}': "
                                f"{one_line(error)}") from error  # fmt: skip
            self._pipeline.set_progress_bar_config(disable=True)
        return self._pipeline

    def _from_pretrained(
        self, class_name: str, folder: Path, variant: str | None, dtype: torch.dtype | None = None
    ) -> Any:
        """Load a diffusers model from its folder."""
        import diffusers

        dtype = dtype or DTYPES[self.options["dtype"]]
        try:
            kind = getattr(diffusers, class_name)
            return kind.from_pretrained(folder, torch_dtype=dtype, variant=variant, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"teacher.path: cannot load '{folder}': {one_line(error)}") from error


def _with_frames(latents: Tensor) -> Tensor:
    """Return latents [B, C, f, h, w], of one frame where they have none."""
    return latents[:, :, None] if latents.ndim == 4 else latents


def checkpoint(module: nn.Module, *args: Any) -> Any:
    """Call ``module`` and recompute its activations in the backward pass."""
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    return torch_checkpoint(module.__call__, *args, use_reentrant=False)
