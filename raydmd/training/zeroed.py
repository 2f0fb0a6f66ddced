"""Samples whose gradient is not finite are left out of an update: whose they are, and when they are too many."""

from collections.abc import Mapping

import torch

from raydmd.config.recipe import Recipe
from raydmd.errors import RunError

ROLES = ("generator", "teacher", "fake")


def by_role(zeroed: torch.Tensor, x_s: torch.Tensor, teacher: torch.Tensor, fake: torch.Tensor) -> dict[str, int]:
    """Return how many of the zeroed samples each role is to blame for; roles without any are left out.

    A sample is the generator's where its own x_s is not finite, else the teacher's or the fake's where their prediction
    is not; where all are finite the gradient itself was too large, which is the generator's.

    Args:
        zeroed: which samples were left out, bool [B].
        x_s: the generator's samples [B, ...].
        teacher: the teacher's prediction [B, ...].
        fake: the fake score's [B, ...].
    """
    if not zeroed.any():
        return {}
    broken = [~tensor.isfinite().flatten(1).all(1) for tensor in (x_s, teacher, fake)]
    counts, left = dict.fromkeys(ROLES, 0), zeroed
    for role, bad in zip(ROLES, broken, strict=True):
        counts[role] += int((left & bad).sum())
        left = left & ~bad
    counts["generator"] += int(left.sum())
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
