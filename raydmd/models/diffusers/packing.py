"""Latents as tokens of p x p patches, as diffusers' pipelines pack them for their networks."""

from torch import Size, Tensor


def pack(latents: Tensor, p: int = 2) -> Tensor:
    """Return p x p patches as tokens: [B, C, (1,) H, W] to [B, H/p * W/p, p p C], as diffusers' pipeline does."""
    batch, channels, height, width = latents.shape[0], latents.shape[1], latents.shape[-2], latents.shape[-1]
    patches = latents.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // p * (width // p), channels * p * p)


def unpack(tokens: Tensor, shape: Size, p: int = 2) -> Tensor:
    """Return tokens [B, H/p * W/p, p p C] to latents of ``shape`` [B, C, (1,) H, W]."""
    batch, channels, height, width = shape[0], shape[1], shape[-2], shape[-1]
    patches = tokens.reshape(batch, height // p, width // p, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(shape)
