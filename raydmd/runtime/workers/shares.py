"""Who takes how much: shares of a fixed number of micro-batches for workers of unequal speed."""

from collections.abc import Sequence

WORTH = 1.1  # shares change when a step is to get faster by more than this


def counts_by_speed(total: int, speeds: Sequence[float]) -> list[int]:
    """Return how many of ``total`` equal pieces each worker takes so that the last is done soonest."""
    counts = [0] * len(speeds)
    for _ in range(total):
        taker = min(range(len(speeds)), key=lambda i: ((counts[i] + 1) / speeds[i], i))
        counts[taker] += 1
    return counts


def even_counts(total: int, workers: int) -> list[int]:
    """Return shares as even as can be, larger ones first."""
    each, rest = divmod(total, workers)
    return [each + (rank < rest) for rank in range(workers)]


def better_counts(counts: list[int], speeds: Sequence[float | None]) -> list[int]:
    """Return shares by measured speed where that is worth a change, else ``counts``."""
    known = [speed for speed in speeds if speed]
    if len(known) < len(counts):
        return counts
    other = counts_by_speed(sum(counts), known)
    return other if _seconds(counts, known) > WORTH * _seconds(other, known) else counts


def _seconds(counts: Sequence[int], speeds: Sequence[float]) -> float:
    return max(count / speed for count, speed in zip(counts, speeds, strict=True))
