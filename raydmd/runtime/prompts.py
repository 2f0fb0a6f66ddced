"""The prompt stream: Ray Data reads and encodes Parquet; the k-th sample of a run gets row k mod N."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raydmd.config import Recipe
from raydmd.data.prompts import to_numpy
from raydmd.models.protocol import Family
from raydmd.runs import recipe_family
from raydmd.runtime.wire import to_wire

KEPT = 3  # iterations: after a loss the one before the one under way may be taken again, and one is asked for ahead


class Encoder:
    """Turns Parquet columns into condition arrays; for large sets an actor of Ray Data's pool."""

    def __init__(self, family: Family, path: str) -> None:
        self.family, self.path = family, path

    def __call__(self, rows: pa.Table) -> dict[str, np.ndarray]:
        """Encode one block of rows."""
        columns = {name: to_numpy(rows.column(name), name, self.path) for name in rows.column_names}
        return to_wire(self.family.conditions(columns))


class PromptStream:
    """An actor that hands out the conditions of every micro-batch of an iteration, in order.

    Rows stay in the file's order. Encoded prompts that fit in ``prompts.cache_mb`` are encoded here and kept;
    larger sets are streamed and encoded anew each pass, by actors of their own. A stream goes forward only, and to
    begin it anew reads all rows before: so what a recovery asks for again is kept, and the previews' rows are read
    beside the stream, once.
    """

    def __init__(self, recipe: Recipe, path: str) -> None:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.use_datasource_v2 = False  # it would start dozens of actors anywhere to read one file's footer
        self.recipe, self.family = recipe, recipe_family(recipe)
        self.micro = recipe.batch.micro or recipe.batch.size
        columns = list(self.family.condition_columns)
        dataset = ray.data.read_parquet(path, columns=columns or None, num_cpus=0.1)
        self.total = dataset.count()
        self.cache: dict[str, np.ndarray] | None = {} if not columns else None
        self._fits = not columns
        if columns:
            self._encode = Encoder(self.family, path)
            first = self._encode(dataset.take_batch(1, batch_format="pyarrow"))
            each = sum(value.nbytes for value in first.values())
            self._fits = each * self.total <= recipe.prompts.cache_mb * 2**20
            if not self._fits:
                dataset = dataset.map_batches(
                    Encoder, fn_constructor_args=(self.family, path), concurrency=recipe.prompts.encoders, num_cpus=0.1,
                    batch_size=max(self.micro, 256), batch_format="pyarrow",
                )  # fmt: skip
        self.dataset = dataset
        self._rows: Iterator[dict[str, np.ndarray]] | None = None
        self._position = -1
        self._taken: dict[int, list[Any]] = {}  # the last iterations
        self._previewed: dict[str, np.ndarray] | None = None

    def ready(self) -> str:
        """Return how many prompts there are, once the first pass can begin; small sets are encoded by then."""
        self._keep()
        return f"{self.total} prompts"

    def take(self, iteration: int) -> list[Any]:
        """Return the conditions of all the iteration's micro-batches: fake updates' first, then the generator's."""
        if iteration in self._taken:
            return self._taken[iteration]
        size, draws = self.recipe.batch.size, self.recipe.method.fake_updates + 1
        first = iteration * draws * size
        taken = [self.rows(first + start, self.micro) for start in range(0, draws * size, self.micro)]
        if self.cache is None:
            if len(self._taken) == KEPT + self.recipe.runtime.max_staleness:
                del self._taken[next(iter(self._taken))]
            self._taken[iteration] = taken
        return taken

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return the conditions of the run's samples ``start .. start + count``."""
        self._keep()
        if self.cache is not None:
            index = np.arange(start, start + count) % self.total
            return {name: values[index] for name, values in self.cache.items()}
        if start == 0 and count == self.recipe.monitor.samples:
            if self._previewed is None:
                index, batch = np.arange(count) % self.total, self.dataset.take_batch(count, batch_format="numpy")
                self._previewed = {name: values[index] for name, values in batch.items()}
            return self._previewed
        if start != self._position:
            self._seek(start)
        parts: list[dict[str, np.ndarray]] = []
        for _ in range(count):
            assert self._rows is not None
            parts.append(next(self._rows))
        self._position = start + count
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _keep(self) -> None:
        """Encode a small set, unless that is done; the actor may have been restarted."""
        if self.cache is None and self._fits:
            blocks = self.dataset.iter_batches(batch_size=1024, batch_format="pyarrow")
            parts = [self._encode(block) for block in blocks]
            self.cache = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _seek(self, start: int) -> None:
        self._rows = self._endless()
        for _ in range(start % self.total):
            next(self._rows)

    def _endless(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            for batch in self.dataset.iter_batches(batch_size=max(self.micro, 64), batch_format="numpy"):
                for row in range(len(next(iter(batch.values())))):
                    yield {name: values[row] for name, values in batch.items()}
