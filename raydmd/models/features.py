"""What a network's blocks put out on the way to its prediction: what discriminators judge by."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from raydmd.errors import UserError, nearest
from raydmd.models.base import Conditions, Denoiser

MOST = 4  # blocks that are read where none are named


def chosen_blocks(denoiser: Denoiser, names: Sequence[str] | None, key: str) -> list[str]:
    """Return the blocks to be read, by name: those given, else as many as four, evenly over the depth.

    Args:
        denoiser: the network.
        names: of blocks; None: choose.
        key: of the recipe, for errors.

    Raises:
        UserError: a block that the network does not have, or it has none that can be read.
    """
    there = list(denoiser.feature_blocks())
    if not there:
        raise UserError(f"{key}: this family's network has no blocks whose features can be read")
    for name in names or ():
        if name not in there:
            raise UserError(f"{key}: the network has no block '{name}'{nearest(name, there)}")
    return list(names) if names else evenly(there)


def evenly(there: Sequence[str]) -> list[str]:
    """Return as many as four of some names, evenly over them, the last among them."""
    count = min(MOST, len(there))
    return [there[(k + 1) * len(there) // count - 1] for k in range(count)]


def read_features(
    denoiser: Denoiser, names: Sequence[str], x: Tensor, t: Tensor, conditions: Conditions
) -> tuple[Tensor, list[Tensor]]:
    """Return the prediction on ``x`` [B, ...] at ``t`` [B], and each block's features, [B, C] or [B, C, *grid]."""
    blocks, found = denoiser.feature_blocks(), dict[str, Tensor]()

    def keep(name: str) -> Any:
        shape = denoiser.block_shape(name, tuple(x.shape[1:]))

        def hook(module: nn.Module, given: Any, output: Any) -> None:
            found[name] = denoiser.feature_map(output, shape)

        return hook

    handles = [blocks[name].register_forward_hook(keep(name)) for name in names]
    try:
        prediction = denoiser(x, t, conditions)
    finally:
        for handle in handles:
            handle.remove()
    return prediction, [found[name] for name in names]
