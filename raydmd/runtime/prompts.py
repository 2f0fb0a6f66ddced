"""The prompt stream: reads and encodes the rows that a run's samples use, in the order of `PromptOrder`."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.data.row_order import PromptOrder
from raydmd.errors import UserError
from raydmd.evaluation.validation_prompts import validation_conditions
from raydmd.methods.registry import build_method
from raydmd.models.base import Family
from raydmd.models.buckets import Buckets
from raydmd.models.encoding import encode, encode_rows
from raydmd.runs.run import recipe_family
from raydmd.runtime.workers.helpers import Helper, tracked
from raydmd.runtime.workers.wire import to_wire

KEPT = 3  # iterations: after a loss the one before the one under way may be taken again, and one is asked for ahead
CHUNK_BYTES, CHUNK_ROWS = 32 * 2**20, 256  # encoded rows that are read and encoded at once, at most
ROW = "raydmd-row"  # the column of rows' numbers, between the two kinds of actors
PASS_CHUNKS = 1000  # of one execution of Ray Data, each chunk a task; then the next one is started


class Reader:
    """An actor of Ray Data that reads the rows of the run's samples, a chunk a call; it is where the file is."""

    def __init__(self, recipe: Recipe, path: str, columns: list[str], first: int, end: int, chunk: int) -> None:
        self.table = PromptTable(path, columns)
        self.order = PromptOrder(recipe, self.table.groups, build_method(recipe).draws)
        self.first, self.end, self.chunk = first, end, chunk

    def __call__(self, numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return one chunk of rows."""
        start = self.first + int(numbers["id"][0]) * self.chunk
        rows = self.order.samples(start, min(self.chunk, self.end - start))
        return {ROW: rows, **self.table.take(rows)}


class Encoder:
    """Turns Parquet columns into condition arrays; for large sets an actor of Ray Data's pool."""

    def __init__(self, family: Family, path: str) -> None:
        self.family, self.path = family, path

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode one block of rows."""
        return to_wire(encode(self.family, rows, rows.pop(ROW), self.path))


class PromptStream(Helper):
    """An actor that hands out the conditions of every micro-batch of an iteration, in order.

    Encoded prompts that fit in ``prompts.cache_mb`` are encoded here and kept. Larger sets are read and encoded anew
    each epoch by actors of Ray Data, which work ahead. They go forward only: what a recovery asks for again is kept,
    and any other iteration starts them afresh, at its first row. Nothing but the iteration says which rows it uses, so
    an actor that was restarted goes on as if it had not been.

    Args:
        recipe: the run's recipe.
        path: the Parquet file or folder, on this node or a URI.
    """

    def __init__(self, recipe: Recipe, path: str) -> None:
        self.recipe, self.path, self.family = recipe, path, recipe_family(recipe)
        self.size, self.streams = recipe.batch.size, build_method(recipe).draws
        self.draws = len(self.streams)
        self.micro = recipe.batch.micro or recipe.batch.size
        self.columns = list(self.family.condition_columns)
        self.buckets = Buckets(recipe, self.family)
        self._opened: tuple[PromptTable, PromptOrder] | None = None
        self._cache: dict[str, np.ndarray] | None = None
        self._chunk = 1
        self._coming: Iterator[dict[str, np.ndarray]] = iter(())
        self._next = -1  # the iteration whose micro-batches come
        self._taken: dict[int, list[Any]] = {}  # the last iterations
        self._previewed: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    @tracked
    def ready(self) -> str:
        """Return how many prompts there are, once the first can be taken; small sets are encoded by then.

        Raises:
            UserError: a file or a row of it that cannot be used.
        """
        table, _ = self._open()
        return f"{len(table)} prompts"

    @tracked
    def take(self, iteration: int) -> list[Any]:
        """Return the conditions of all the iteration's micro-batches, draw by draw, each for its draw's bucket."""
        if iteration in self._taken:
            return self._taken[iteration]
        _, order = self._open()
        each = self.draws * self.size
        if self._cache is not None:
            first = iteration * each
            taken = [self._of_rows(order.samples(first + at, self.micro)) for at in range(0, each, self.micro)]
            return self._for_buckets(iteration, taken)
        taken = self._for_buckets(iteration, self._stream(iteration))
        if len(self._taken) == KEPT + self.recipe.runtime.max_staleness:
            del self._taken[next(iter(self._taken))]
        self._taken[iteration] = taken
        return taken

    def _for_buckets(self, iteration: int, taken: list[Any]) -> list[Any]:
        """Leave each micro-batch what samples of its bucket take."""
        sized = [self.buckets.family_of(iteration, draw) for draw in range(self.draws)]
        return [sized[number // self.recipe.batch.micros].for_size(each) for number, each in enumerate(taken)]

    @tracked
    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return the conditions of ``count`` rows from ``start`` on in the file's order, as for previews."""
        table, _ = self._open()
        if (start, count) not in self._previewed:
            rows = (np.arange(count) + start) % len(table)
            self._previewed = {(start, count): self.family.for_size(self._of_rows(rows))}
        return self._previewed[start, count]

    @tracked
    def previews(self, count: int) -> dict[str, np.ndarray]:
        """Return the conditions of a preview's samples: those of ``monitor.prompts``, else of the first rows."""
        if self.recipe.monitor.prompts is None:
            return self.rows(0, count)
        if (-1, count) not in self._previewed:
            family = recipe_family(self.recipe)  # its text encoder is not kept
            self._previewed = {(-1, count): to_wire(validation_conditions(self.recipe, family, count))}
        return self._previewed[-1, count]

    @tracked
    def pairs(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return the conditions of the ODE pairs ``start .. start + count``."""
        _, order = self._open()
        return self._of_rows(order.pairs(start, count))

    def _of_rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        table, _ = self._open()
        if self._cache is not None:
            return {name: values[rows] for name, values in self._cache.items()}
        return self._encode(table, rows)

    def _open(self) -> tuple[PromptTable, PromptOrder]:
        """Open the table, and encode a small one, unless that is done; the actor may have been restarted."""
        if self._opened is None:
            table = PromptTable(self.path, self.columns)
            each = sum(value.nbytes for value in self._encode(table, np.arange(1)).values())
            if not self.columns:
                self._cache = {}
            elif each * len(table) <= self.recipe.prompts.cache_mb * 2**20:
                self._cache = self._encode_all(PromptTable(self.path, self.columns))
            self._chunk = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(each, 1)))
            self._opened = table, PromptOrder(self.recipe, table.groups, self.streams)
        return self._opened

    def _encode(self, table: PromptTable, rows: np.ndarray) -> dict[str, np.ndarray]:
        return to_wire(encode_rows(self.family, table, rows))

    def _encode_all(self, table: PromptTable, block: int = 1024) -> dict[str, np.ndarray]:
        starts = range(0, len(table), block)
        parts = []
        for start in starts:
            parts.append(self._encode(table, np.arange(start, min(start + block, len(table)))))
            self.advance()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _stream(self, iteration: int) -> list[Any]:
        """Return an iteration's micro-batches from the actors of Ray Data.

        Raises:
            UserError: a row that cannot be used; the first that is found, at the latest when it is needed.
        """
        try:
            return self._next_of(iteration)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            raise (error if cause is None else cause) from None

    def _next_of(self, iteration: int) -> list[Any]:
        wanted = self.draws * self.recipe.batch.micros
        taken = list(islice(self._coming, wanted)) if iteration == self._next else []
        if len(taken) < wanted:  # another iteration than the next, or the last execution is at its end
            self._coming = self._execute(iteration)
            taken = [next(self._coming) for _ in range(wanted)]
        self._next = iteration + 1
        return taken

    def _execute(self, iteration: int) -> Iterator[dict[str, np.ndarray]]:
        """Have Ray Data read and encode from an iteration on; yields micro-batches in order."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        each = self.draws * self.size
        first, length = iteration * each, max(1, PASS_CHUNKS * self._chunk // each) * each
        count = -(-length // self._chunk)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        numbers = [
            {"id": number} for number in range(count)
        ]  # blocks that take no CPU to make, unlike ray.data.range's
        dataset = ray.data.from_items(numbers, override_num_blocks=count).map_batches(
            Reader, fn_constructor_args=(self.recipe, self.path, self.columns, first, first + length, self._chunk),
            concurrency=1, num_cpus=0.1, batch_size=1, batch_format="numpy", scheduling_strategy=here,
        ).map_batches(
            Encoder, fn_constructor_args=(self.family, self.path), concurrency=self.recipe.prompts.stream_workers,
            num_cpus=0.1, batch_size=None, batch_format="numpy",
        )  # fmt: skip
        for batch in dataset.iter_batches(batch_size=self.micro, batch_format="numpy"):
            self.advance()
            yield batch
