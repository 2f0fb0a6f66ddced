"""A batch whose samples go to different networks: each network is called once, with the samples that are its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raydmd.data.conditions import Conditions

Rows = Tensor | slice
"""Which samples of a batch."""


def by_part(part_of: Tensor, call: Callable[[int, Rows], Sequence[Tensor]]) -> list[Tensor]:
    """Call each part with its samples' rows, and return the results in the batch's order.

    Args:
        part_of: the part's number of each sample, [B].
        call: returns tensors [rows, ...], as many from each part; not called for a part that has no sample.
    """
    numbers = part_of.tolist()
    parts = sorted(set(numbers))
    if len(parts) == 1:
        return list(call(parts[0], slice(None)))
    rows = [torch.tensor([row for row, number in enumerate(numbers) if number == part]) for part in parts]
    back = torch.cat(rows).argsort()
    made = [call(part, each) for part, each in zip(parts, rows, strict=True)]
    return [torch.cat(each)[back] for each in zip(*made, strict=True)]


def rows_of(conditions: Conditions, rows: Rows) -> Conditions:
    """Return the conditions of some samples."""
    return {name: value[rows] for name, value in conditions.items()}
