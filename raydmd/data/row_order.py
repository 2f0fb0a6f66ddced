"""Which row of the prompts each sample of a run uses: every stream of samples walks all rows, once an epoch.

The fake score's rollouts, the generator's own batches and the ODE pairs are streams of their own. A stream's position
is the number of samples that it has taken; position p lies in epoch p // N, and each epoch is a new permutation of the
N rows, keyed by (seed, epoch, stream). So a row is a function of its stream and position alone: nothing depends on who
asks, on how many ask, or on what was asked before, and a run that goes on needs no more than the position.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import Key, permutation

WINDOW_BYTES = 64 * 2**20
"""Rows are mixed inside windows of about this size, which a reader can hold in memory."""


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file, the least that is read at once: its rows, its bytes uncompressed."""

    rows: int
    size: int


class RowOrder:
    """The order in which one stream goes through the rows of a table.

    An epoch permutes the table's row groups, joins them in that order to windows of at most `WINDOW_BYTES` (a larger
    group is a window of its own), and permutes the rows of each window. A table that fits into one window, as small
    ones do, is permuted as a whole, whatever its row groups; a larger one needs a window in memory, no more, and each
    row group is read once an epoch.

    Args:
        seed: the run's.
        stream: the stream's name; two streams have independent orders.
        groups: the table's row groups in file order.

    Raises:
        ValueError: the table has no rows.
    """

    def __init__(self, seed: int, stream: str, groups: Sequence[RowGroup]) -> None:
        self.seed, self.stream = seed, stream
        self.groups = [group for group in groups if group.rows]
        self.total = sum(group.rows for group in self.groups)
        if not self.total:
            raise ValueError("a table without rows has no order")
        self._firsts = [0, *accumulate(group.rows for group in self.groups)]
        self._epoch: tuple[int, list[list[int]], list[int]] = (-1, [], [])
        self._window: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))

    def rows(self, start: int, count: int) -> np.ndarray:
        """Return the row numbers, int64 [count], of the stream's positions ``start .. start + count``.

        Raises:
            ValueError: a negative start or count.
        """
        if start < 0 or count < 0:
            raise ValueError(f"positions count from 0, not from {start} on, {count} of them")
        parts = [np.empty(0, np.int64)]
        while count:
            epoch, at = divmod(start, self.total)
            windows, ends = self._windows(epoch)
            number = bisect_right(ends, at)
            first = ends[number - 1] if number else 0
            part = self._mixed(epoch, number, windows[number])[at - first : at - first + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _windows(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """Return an epoch's windows, each the numbers of its row groups, and the positions at which they end."""
        if self._epoch[0] != epoch:
            windows: list[list[int]] = []
            held = 0
            for group in permutation(Key(self.seed, 0, f"{self.stream}/groups", epoch), len(self.groups)).tolist():
                held += self.groups[group].size
                if not windows or held > WINDOW_BYTES:
                    windows.append([])
                    held = self.groups[group].size
                windows[-1].append(group)
            ends = list(accumulate(sum(self.groups[group].rows for group in window) for window in windows))
            self._epoch = epoch, windows, ends
        return self._epoch[1:]

    def _mixed(self, epoch: int, number: int, window: list[int]) -> np.ndarray:
        """Return the rows of a window in the order in which they are taken."""
        if self._window[0] != (epoch, number):
            rows = np.concatenate([np.arange(self._firsts[g], self._firsts[g + 1]) for g in sorted(window)])
            order = permutation(Key(self.seed, 0, f"{self.stream}/window-{number}", epoch), len(rows))
            self._window = (epoch, number), rows[order]
        return self._window[1]


class PromptOrder:
    """The rows that a run's samples use, by iteration and draw; the ODE pairs', by pair.

    Each iteration makes the same draws, of ``batch.size`` samples each, and each draw goes on in its own stream. After
    any number of iterations two rows have been used equally often, or one once more than the other, in every stream.

    Args:
        recipe: its seed and batch count.
        groups: the table's row groups in file order.
        draws: the stream of each draw of an iteration.
    """

    def __init__(self, recipe: Recipe, groups: Sequence[RowGroup], draws: Sequence[str]) -> None:
        self.size, self.draws = recipe.batch.size, tuple(draws)
        self._streams = {name: RowOrder(recipe.seed, f"prompts/{name}", groups) for name in self.draws}
        self._pairs = RowOrder(recipe.seed, "prompts/pairs", groups)

    def draw(self, iteration: int, number: int, start: int, count: int) -> np.ndarray:
        """Return the rows, int64 [count], of samples ``start .. start + count`` of one draw.

        Args:
            iteration: of the run.
            number: of the draw in the iteration.
            start: the first sample in the global batch.
            count: how many; not beyond the batch.
        """
        stream = self.draws[number]
        before = iteration * self.draws.count(stream) + self.draws[:number].count(stream)
        return self._streams[stream].rows(before * self.size + start, count)

    def samples(self, start: int, count: int) -> np.ndarray:
        """Return the rows, int64 [count], of the run's samples ``start .. start + count``, numbered draw by draw."""
        parts = [np.empty(0, np.int64)]
        while count:
            draw, at = divmod(start, self.size)
            taken = min(count, self.size - at)
            parts.append(self.draw(*divmod(draw, len(self.draws)), at, taken))
            start, count = start + taken, count - taken
        return np.concatenate(parts)

    def pairs(self, start: int, count: int) -> np.ndarray:
        """Return the rows, int64 [count], of the ODE pairs ``start .. start + count``."""
        return self._pairs.rows(start, count)
