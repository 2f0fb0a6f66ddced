"""The learning rate of an update: of its number within the phase alone, never of time or of how many workers there are.

So it needs no state of its own: whoever goes on from an optimizer's number of updates goes on with the same rates.
"""

import math

from raydmd.config.recipe import Optimizer


def learning_rate(settings: Optimizer, number: int, total: int | None = None) -> float:
    """Return the learning rate of an update.

    Over the first ``warmup`` updates it rises linearly, the last of them has the whole ``lr``. Then it stays, or falls
    towards ``final`` of it, which it has after the phase's last update: by a straight line, or by half a period of a
    cosine (SGDR, Eq. 5, without restarts; `torch.optim.lr_scheduler.CosineAnnealingLR`).

    Args:
        settings: ``lr``, ``warmup``, ``schedule`` and ``final``.
        number: updates of the role that come before it in its phase.
        total: updates of the role in the phase; a constant rate needs none.

    Raises:
        ValueError: a rate that falls, and no total or one that the number is beyond.
    """
    if number < settings.warmup:
        return settings.lr * (number + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    if total is None or number >= total:
        raise ValueError(f"schedule {settings.schedule}: update {number} of {total} in the phase")
    done = (number - settings.warmup) / (total - settings.warmup)
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * (settings.final + (1 - settings.final) * left)
