"""Classifier-free guidance, and what a model's own pipeline does with its result."""

from typing import Literal

import torch
from torch import Tensor

from raydmd.diffusion.schedule import at_least_float32

GuidanceRescale = Literal["none", "norm"]
"""What becomes of the guided prediction: nothing, or each token of it gets the conditional one's norm."""


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, u + guidance_scale (c - u), in at least float32; a scale of 1 is the conditional.

    Self-Forcing and CausVid write c + w (c - u): their w is guidance_scale - 1.
    """
    c, u = at_least_float32(conditional), at_least_float32(unconditional)
    return u + guidance_scale * (c - u)


def with_norm_of(conditional: Tensor, prediction: Tensor, patches: tuple[int, int, int]) -> Tensor:
    """Scale each token of a guided prediction to the norm that the conditional one has there, in at least float32.

    It is what diffusers' QwenImagePipeline does with ``true_cfg_scale`` above 1. A token that is zero stays so.

    Args:
        conditional: the prediction with the prompt, [B, C, ..., H, W].
        prediction: the guided one, of its shape.
        patches: latents of a token along frames, height and width; of a picture the last two count.
    """
    guided = at_least_float32(prediction)
    ratio = _token_norms(at_least_float32(conditional), patches) / _token_norms(guided, patches)
    ratio = torch.where(ratio.isfinite(), ratio, 1.0)
    for axis, size in zip(range(2, guided.ndim), patches[5 - guided.ndim :], strict=True):
        ratio = ratio.repeat_interleave(size, dim=axis)
    return guided * ratio


def _token_norms(x: Tensor, patches: tuple[int, int, int]) -> Tensor:
    """Return the norm of each token, [B, 1, tokens along each axis]."""
    squares = x.square().sum(1, keepdim=True)
    for axis, size in zip(range(2, x.ndim), patches[5 - x.ndim :], strict=True):
        squares = squares.unflatten(axis, (-1, size)).sum(axis + 1)
    return squares.sqrt()
