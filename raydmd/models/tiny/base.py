"""A family's tiny model: a pipeline's folder of diffusers' real classes with random weights, and its own first step."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from raydmd.models.base import Family
from raydmd.models.registry import build_family

Rows = dict[str, np.ndarray]


class TinyModel(ABC):
    """What a family is tried on without its weights.

    Attributes:
        family: the family's name.
        options: of the teacher.
        tokens: of a prompt.
    """

    family: ClassVar[str]
    options: ClassVar[Mapping[str, Any]]
    tokens: ClassVar[int] = 7

    @property
    def name(self) -> str:
        """The model's key in ``TINY_MODELS``."""
        return self.family

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """Make the pipeline's parts by their subfolders: the network, its VAE, its scheduler."""

    @abstractmethod
    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw the embeddings of ``count`` prompts, and the null prompt's, as the family's conditions take them."""

    def first_step(self, folder: Path, rows: Rows, latents: Tensor, guidance_scale: float, steps: int) -> Tensor | None:
        """Return the latents [B, ...] after the first of ``steps`` steps of diffusers' own pipeline.

        Args:
            folder: of `save`.
            rows: of `columns`.
            latents: [B, *latent_shape] of normal numbers, where it begins.
            guidance_scale: as the family has it.
            steps: of the sampler.

        Returns:
            None where diffusers has no pipeline.
        """
        return None

    def encoders(self) -> Any | None:
        """Return a pipeline with nothing in it but text encoders and tokenizers; None: the family reads no texts."""
        return None

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the pipeline's folder without text encoders, and return it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, part in self.parts().items():
                part.save_pretrained(folder / name)
        return folder

    def build(self, folder: Path, **options: Any) -> Family:
        """Return the family with the tiny teacher in ``folder``."""
        return build_family(self.family, str(folder), {**self.options, **options})

    def rows(self, count: int, seed: int = 0) -> Rows:
        """Return ``count`` random prompts."""
        return self.columns(count, np.random.default_rng(seed))


def normal_rows(draw: np.random.Generator, count: int, *shape: int) -> np.ndarray:
    """Return normal numbers [count, *shape], float32."""
    return draw.standard_normal((count, *shape)).astype(np.float32)


def as_tensors(rows: Rows) -> dict[str, Tensor]:
    """Return rows as a pipeline takes them."""
    return {name: torch.from_numpy(column) for name, column in rows.items()}


def to_variance_preserving(latents: Tensor, sigma: Tensor) -> Tensor:
    """Return latents x_0 + sigma eps, as EulerDiscreteScheduler has them, divided by sqrt(1 + sigma^2)."""
    return latents / (1.0 + sigma.double().square()).sqrt().float()


class FirstStep:
    """A pipeline's callback that keeps the latents after the first step and ends the run there."""

    def __init__(self) -> None:
        self.latents: Tensor | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Keep the latents of step 0."""
        if self.latents is None:
            self.latents = given["latents"].clone()
        pipeline._interrupt = True
        return given

    def of(self, pipeline: Any, **call: Any) -> Tensor:
        """Call the pipeline and return those latents."""
        pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            pipeline(**call, output_type="latent", callback_on_step_end=self)
        assert self.latents is not None
        return self.latents
