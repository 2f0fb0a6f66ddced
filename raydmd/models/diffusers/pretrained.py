"""What the families of diffusers' pretrained networks share: the network, and the times of its own sampler."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from raydmd.config.recipe import Quantization
from raydmd.diffusion.schedule import RectifiedFlow, Schedule
from raydmd.errors import UserError, nearest
from raydmd.models.base import Denoiser
from raydmd.models.diffusers.denoiser import PretrainedDenoiser, checkpoint
from raydmd.models.diffusers.loading import load_model
from raydmd.models.diffusers.pictures_by_vae import PicturesByVAE
from raydmd.models.diffusers.pipeline_folder import DTYPES
from raydmd.models.diffusers.prompts_by_pipeline import PromptsByPipeline
from raydmd.models.diffusers.quantization import (
    check_dtype,
    check_layers,
    check_library,
    diffusers_networks,
    in_dtype,
    quantized_copy,
    savings,
)
from raydmd.models.diffusers.sampler_grid import sampler_grid
from raydmd.models.diffusers.student_sampler import SampledByDiffusers
from raydmd.models.diffusers.teacher_folder import ALONE, CONFIG
from raydmd.models.diffusers.teacher_lora import fuse_teacher_lora, lora_files, read_lora
from raydmd.models.diffusers.weight_files import (
    check_same_config,
    check_weights,
    meta_network,
    read_json,
    weight_files,
)


class Grid(Protocol):
    """The law of the times that a teacher's own sampler visits."""

    def times(self, steps: int, tokens: int) -> list[float]:
        """Return the ``steps`` + 1 falling times, ending in 0, for a sample of ``tokens`` tokens."""
        ...


class PretrainedFamily(SampledByDiffusers, PromptsByPipeline, PicturesByVAE):
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

    network_class: ClassVar[str]
    denoiser: ClassVar[type[PretrainedDenoiser]]
    gives_sigmas: ClassVar[bool] = False  # whether the pipeline gives its scheduler sigmas and mu
    gives_mu: ClassVar[bool] = False  # whether it gives mu without sigmas
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
        self._quantization: Quantization = "none"

    # What a family's file may say otherwise.

    @cached_property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The process that the network was trained on."""
        return RectifiedFlow()

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The pipelines that the family runs as they are made."""
        return (self.pipeline_class,)

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

    def _read_grid(self, config: Mapping[str, Any]) -> Grid:
        """Read the law of its own sampler's times from its scheduler_config.json."""
        return sampler_grid(config, sigmas_given=self.gives_sigmas, mu_given=self.gives_mu)

    # The network.

    def use_lora(self, path: str) -> None:
        """Have a LoRA fused into the network when it is loaded."""
        self._lora = path

    def use_quantization(self, kind: Quantization) -> None:
        """Have the frozen network's linear layers in 8 bits where it scores and samples."""
        self._quantization = kind

    @property
    def quantization(self) -> Quantization:
        """What `use_quantization` was told."""
        return self._quantization

    def check_quantization(self) -> None:
        """Refuse a machine without torchao, and weights of a dtype that its kernels do not take."""
        if self._quantization != "none":
            check_library()
            check_dtype(self._quantization, self.options["dtype"])

    def scoring_network(self, teacher: Denoiser, device: torch.device) -> Denoiser:
        """Return the teacher, or a quantized copy of it."""
        if self._quantization == "none":
            return teacher
        self.check_quantization()
        return quantized_copy(teacher, self._quantization, device)

    def quantization_note(self) -> str | None:
        """Return a line on how many layers are quantized, and the memory before and after, by the configs."""
        if self._quantization == "none":
            return None
        networks = [in_dtype(each, DTYPES[self.options["dtype"]]) for each in diffusers_networks(self.outline())]
        return savings(networks, self._quantization).describe(self._quantization)

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

    def check_part(self, part: str) -> None:
        """Refuse a part of the pipeline's folder that `load_part` would not load, by its config and headers.

        Raises:
            UserError: ``teacher...: ...``: it is not there, not whole, or does not fit.
        """
        folder = self._root() / part
        network = self._meta_network(folder)
        self._check_config(network.config)
        check_weights(folder, weight_files(folder, self.options["variant"]), network)

    def load_part(self, part: str) -> Denoiser:
        """Load one network of the pipeline's folder alone, frozen, whichever of an export's experts it is.

        Args:
            part: its folder, as ``transformer_2``.

        Raises:
            UserError: what `check_part` refuses.
        """
        self.check_part(part)
        variant, dtype = self.options["variant"] or None, DTYPES[self.options["dtype"]]
        return (
            self._wrap(load_model(self.network_class, self._root() / part, variant, dtype)).requires_grad_(False).eval()
        )

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
        if self._quantization != "none":
            check_layers(networks, self._quantization)
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

    def teacher_files(self) -> dict[str, Path]:
        """Return the networks' configs and weights, a LoRA's, and what of the pipeline training depends on."""
        folder = self.teacher_folder()
        folder.fetch_weights(self.options["variant"])
        lora = {} if self._lora is None else lora_files(self._lora)
        return {**folder.files(self.options["variant"]), **lora}

    def check_latents(self) -> None:
        """Hold the shape against the network's config, where `check_teacher` has read it."""
        self._check_latent_shape()
        if hasattr(self, "_config"):
            self._check_config(self._config)

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
