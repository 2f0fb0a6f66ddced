"""A diffusers network behind the `Denoiser` protocol."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raydmd.models.base import Denoiser


class PretrainedDenoiser(Denoiser):
    """A diffusers network, kept under its part's name in the pipeline.

    So its parameters' names begin as those in diffusers' LoRA files do: ``transformer.`` or ``unet.``.

    Args:
        network: the diffusers model.
        component: its part's name; None: the usual one.
    """

    component: str = "transformer"

    def __init__(self, network: nn.Module, component: str | None = None) -> None:
        super().__init__()
        self.component = component or self.component
        self.add_module(self.component, network)

    @property
    def network(self) -> Any:
        """The diffusers model."""
        return getattr(self, self.component)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network takes its input."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    def checkpoint_activations(self, run: Callable[..., Any]) -> bool:
        """Recompute each block in the backward pass, through ``run(block, *args)``."""
        self.network.enable_gradient_checkpointing(run)
        return True

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return bool(self.network.is_gradient_checkpointing)


def checkpoint(module: nn.Module, *args: Any) -> Any:
    """Call ``module`` and recompute its activations in the backward pass."""
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    return torch_checkpoint(module.__call__, *args, use_reentrant=False)


def with_frames(latents: Tensor) -> Tensor:
    """Return latents [B, C, f, h, w], of one frame where they have none."""
    return latents[:, :, None] if latents.ndim == 4 else latents
