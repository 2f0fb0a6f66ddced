"""Samples whose gradient is not finite are left out of an update: whose they are, and when they are too many."""

from collections.abc import Mapping

import torch

from raydmd.config.recipe import Recipe
from raydmd.errors import RunError


def broken_samples(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a gradient [B, ...] with zeros for each sample whose is not finite throughout, and which these are."""
    finite = finite_samples(gradient)
    return zero_others(finite, gradient), ~finite


def finite_samples(x: torch.Tensor) -> torch.Tensor:
    """Return which samples of ``x`` [B, ...] are finite throughout, bool [B]."""
    return x.isfinite().flatten(1).all(1)


def zero_others(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [B, ...] with zeros for the samples that are not kept, bool [B]."""
    return torch.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def by_role(zeroed: torch.Tensor, **made: torch.Tensor) -> dict[str, int]:
    """Return how many of the zeroed samples each role is to blame for; roles without any are left out.

    A sample is the fault of the first role whose own tensor is not finite; where all are finite the gradient itself was
    too large, which is the first role's.

    Args:
        zeroed: which samples were left out, bool [B].
        made: what each role has made of the samples [B, ...], the generator first.
    """
    if not zeroed.any():
        return {}
    counts, left = dict.fromkeys(made, 0), zeroed
    for role, tensor in made.items():
        bad = ~tensor.isfinite().flatten(1).all(1)
        counts[role] += int((left & bad).sum())
        left = left & ~bad
    counts[next(iter(made))] += int(left.sum())
    return {role: count for role, count in counts.items() if count}


def in_words(zeroed: Mapping[str, int], size: int) -> str:
    """Say how many of an iteration's ``size`` samples were left out, and who made them."""
    who = " and ".join(f"{count} by the {role}" for role, count in zeroed.items())
    return f"{sum(zeroed.values())} of {size} samples had no finite gradient and were left out: made {who}"


def refuse_too_many(recipe: Recipe, iteration: int, zeroed: Mapping[str, int]) -> None:
    """End a run most of whose samples are left out.

    Args:
        recipe: the run's recipe.
        iteration: that they are of.
        zeroed: how many, by role.

    Raises:
        RunError: more than ``monitor.zeroed_end_share`` of the batch.
    """
    size, limit = recipe.batch.size, recipe.monitor.zeroed_end_share
    if sum(zeroed.values()) > limit * size:
        worst = max(zeroed, key=lambda role: zeroed[role])
        raise RunError(
            f"iteration {iteration}: {in_words(zeroed, size)}; that is more than monitor.zeroed_end_share ({limit:g}): "
            f"look at the {worst}'s weights and dtype"
        )
