"""Sampling many in chunks, on all cores, with results that do not depend on how many cores there are."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from raydmd.models.base import Conditions


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one thread inside: with a fixed count of threads its sums are the same bits everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_chunks(make: Callable[[int, int], Tensor], count: int, batch: int) -> Tensor:
    """Return ``make(start, size)`` of ``count`` samples, ``batch`` at a time, joined along the first axis.

    Chunks are spread over the cores as one thread each: small networks gain nothing from threads inside an operation.

    Args:
        make: returns samples ``start .. start + size``; called from several threads at once.
        count: how many in all.
        batch: of a chunk; the cut does not depend on the machine.
    """
    starts = range(0, count, batch)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with single_thread(), ThreadPoolExecutor(max(1, min(len(starts), cores))) as pool:
        return torch.cat(list(pool.map(lambda start: make(start, min(batch, count - start)), starts)))


def part(conditions: Conditions, start: int, count: int) -> Conditions:
    """Return rows ``start .. start + count`` of conditions."""
    return {name: value[start : start + count] for name, value in conditions.items()}
