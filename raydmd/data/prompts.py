"""Prompt tables in Parquet: written once, read by row number; `raydmd.data.row_order` says which row a sample uses."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raydmd.atomic import replacing
from raydmd.data.row_order import WINDOW_BYTES, RowGroup
from raydmd.errors import UserError, nearest

TAKEN = " (taken are .txt, .csv, .jsonl and .parquet files, and folders of .parquet files or of captioned pictures)"
GROUP_BYTES = 16 * 2**20
KEPT_OPEN = 256  # files; a process may have some thousand
CACHED_BYTES = 3 * WINDOW_BYTES  # the windows of two streams, and what a chunk has of the next one


def write_prompts(path: str | Path, rows: Mapping[str, np.ndarray | Sequence[object]]) -> Path:
    """Write columns of equal length to a Parquet file, whole or not at all.

    Args:
        path: the file.
        rows: arrays [N, ...] or lists by column name; what follows N becomes fixed-size lists.

    Raises:
        ValueError: no columns, no rows, or columns of unequal length.
        StorageError: the disk is full or gone.
    """
    path, table = Path(path), to_table(rows)
    group = max(1, int(GROUP_BYTES * table.num_rows / max(table.nbytes, 1)))
    with replacing(path) as part:
        pq.write_table(table, part, row_group_size=group)
    return path


def to_table(rows: Mapping[str, np.ndarray | Sequence[object]]) -> pa.Table:
    """Return columns of equal length as a table.

    Args:
        rows: arrays [N, ...] or lists by column name; what follows N becomes fixed-size lists.

    Raises:
        ValueError: no columns, no rows, or columns of unequal length.
    """
    arrays = {name: np.asarray(values) for name, values in rows.items()}
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(f"columns need one and the same length above 0, not {sorted(lengths)}")
    return pa.table({name: _to_arrow(array) for name, array in arrays.items()})


class PromptTable:
    """A Parquet file (or a folder of them, by name) as rows that can be read in any order, and again and again.

    A row group is read as a whole and the last few are held, so a table of embeddings may be larger than memory. Where
    a run reads in an order of its own (`raydmd.data.row_order`), it holds windows of row groups: those of some ten
    megabytes, as `write_prompts` makes them, cost least; a group larger than that is held as a whole.

    Of several files, those that have shorter lists in a column with a mask (``x`` with ``x_mask``) are padded with
    zeros to the longest, and masked: a file of `raydmd encode` is as long as its own longest text.

    Args:
        path: a file or folder; also a URI that pyarrow.fs knows (``s3://``, ``gs://``).
        columns: those to read; None for all.

    Attributes:
        columns: the names that `rows` returns.
        groups: the row groups in file order.

    Raises:
        UserError: no such file, not Parquet, no rows, or a column that it lacks.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        self.path = str(path)
        self._open_files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._footers: dict[str, pq.FileMetaData] = {}
        files = self._list_files()
        schemas = [self._open(file).schema_arrow for file in files]
        self._places = [(file, i) for file in files for i in range(self._footers[file].num_row_groups)]
        found = [self._footers[file].row_group(i) for file, i in self._places]
        self.groups = [RowGroup(group.num_rows, group.total_byte_size) for group in found]
        self._ends = list(accumulate(group.rows for group in self.groups))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"prompts: '{self.path}' has no rows")
        names = schemas[0].names
        self.columns = list(names if columns is None else columns)
        for schema in schemas:
            for name in self.columns:
                if name not in schema.names:
                    raise UserError(f"prompts: '{self.path}' has no column '{name}'{nearest(name, names)}")
        masked = [name for name in self.columns if f"{name}_mask" in self.columns]
        self._padded = {name: max(_list_size(schema, name) for schema in schemas) for mask in masked
                        for name in (mask, f"{mask}_mask")}  # fmt: skip
        self._cache: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        """Return N, the number of rows on disk."""
        return self._ends[-1]

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return ``count`` rows from row ``start`` on in the file's order, which begins again after the last.

        Raises:
            ValueError: a negative start or count.
            UserError: as `take`.
        """
        if start < 0 or count < 0:
            raise ValueError(f"rows start and count from 0, not {start} and {count}")
        return self.take((np.arange(count) + start) % len(self))

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows by number, in the order given.

        Columns of numbers come as [count], fixed-size lists as [count, ...], text as [count] objects.

        Args:
            rows: whole numbers [count], 0 to N - 1.

        Raises:
            IndexError: a number that is no row's.
            UserError: a list column whose rows are of unequal lengths, empty values, or numbers that are not finite.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows 0..{len(self) - 1}, not {rows.min()}..{rows.max()}")
        group_of = np.searchsorted(self._ends, rows, side="right")
        found, firsts = np.unique(group_of, return_index=True)
        wanted = found[np.argsort(firsts)].tolist() or [0]  # by first use: what is needed last stays in the cache
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
        places = [np.flatnonzero(group_of == index) for index in wanted]
        for index, place in zip(wanted, places, strict=True):
            inside = rows[place] - (self._ends[index] - self.groups[index].rows)
            for name, values in self._group(index).items():
                parts[name].append(values[inside])
        back = np.argsort(np.concatenate(places), kind="stable")
        return {name: self._join(name, values)[back] for name, values in parts.items()}

    def identity(self) -> str:
        """Return what the rows of ``columns`` are, and the order in which runs take them: 32 hexadecimal digits.

        A table that fits into one window (`raydmd.data.row_order`) is told by every value, wherever it lies and however
        it is cut and compressed. Of a larger one, which would take long to read, it is the row groups' sizes, plain and
        compressed, column by column, and the values of the first and the last one.

        Raises:
            UserError: as `take`.
        """
        digest, looked = blake2b(digest_size=16), list(range(len(self.groups)))
        if self.columns and sum(group.size for group in self.groups) > WINDOW_BYTES:
            for (file, number), group in zip(self._places, self.groups, strict=True):
                found = self._footers[file].row_group(number)
                entries = [found.column(i) for i in range(found.num_columns)]
                sizes = [(c.path_in_schema, c.total_uncompressed_size, c.total_compressed_size) for c in entries
                         if c.path_in_schema.partition(".")[0] in self.columns]  # fmt: skip
                digest.update(repr((group.rows, group.size, sizes)).encode())
            looked = [0, looked[-1]]
        for name in sorted(self.columns):
            for place, index in enumerate(looked):
                values = self._group(index)[name]
                if not place:
                    digest.update(repr((name, values.dtype.str, values.shape[1:], len(self))).encode())
                if values.dtype.kind == "O":
                    words = [str(value).encode() for value in values.reshape(-1)]
                    digest.update(b"".join(len(word).to_bytes(8, "little") + word for word in words))
                else:
                    digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _join(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        if len({part.shape[1:] for part in parts}) > 1:
            raise UserError(f"prompts: column '{name}' of '{self.path}' has lists of unequal lengths; pad them")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, index: int) -> dict[str, np.ndarray]:
        """Return a row group's columns; the last `CACHED_BYTES` are kept, and two groups whatever their size."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        file, number = self._places[index]
        table = self._open(file).read_row_group(number, columns=self.columns)
        group = {name: self._pad(name, to_numpy(table.column(name), name, self.path)) for name in self.columns}
        for name, values in group.items():
            self._refuse_not_finite(name, values, self._ends[index] - self.groups[index].rows)
        self._cache[index] = group
        while len(self._cache) > 2 and sum(self.groups[kept].size for kept in self._cache) > CACHED_BYTES:
            self._cache.popitem(last=False)
        return group

    def _pad(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return a column [N, L, ...] as long as the table's longest, where that is known."""
        extra = self._padded.get(name, 0) - (values.shape[1] if values.ndim > 1 else 0)
        return np.pad(values, [(0, 0), (0, extra), *[(0, 0)] * (values.ndim - 2)]) if extra > 0 else values

    def _refuse_not_finite(self, name: str, values: np.ndarray, first: int) -> None:
        """Refuse numbers that are none, in a column whose rows begin with row ``first``."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row = first + np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))[0]
            raise UserError(f"prompts: row {row} of '{self.path}' has values that are not finite in column '{name}'")

    def _list_files(self) -> list[str]:
        self._filesystem: pyarrow.fs.FileSystem
        try:
            if "://" in self.path:
                self._filesystem, place = pyarrow.fs.FileSystem.from_uri(self.path)
            else:
                self._filesystem, place = pyarrow.fs.LocalFileSystem(), self.path
            kind = self._filesystem.get_file_info(place).type
            if kind == pyarrow.fs.FileType.File:
                return [place]
            if kind == pyarrow.fs.FileType.Directory:
                found = self._filesystem.get_file_info(pyarrow.fs.FileSelector(place))
                files = sorted(info.path for info in found if info.path.endswith(".parquet"))
                if not files:
                    raise UserError(f"prompts: folder '{self.path}' has no .parquet file{TAKEN}")
                return files
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"prompts: cannot reach '{self.path}': {' '.join(str(error).split())[:200]}") from error
        raise UserError(f"prompts: no file '{self.path}'{_nearest_file(self.path)}")

    def _open(self, file: str) -> pq.ParquetFile:
        """Return a file of the table; the last `KEPT_OPEN` stay open."""
        if file in self._open_files:
            self._open_files.move_to_end(file)
            return self._open_files[file]
        try:
            found = pq.ParquetFile(self._filesystem.open_input_file(file), metadata=self._footers.get(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"prompts: '{file}' is not a Parquet file{TAKEN}") from error
        self._footers[file], self._open_files[file] = found.metadata, found
        if len(self._open_files) > KEPT_OPEN:
            self._open_files.popitem(last=False)[1].close(force=True)
        return found


def to_numpy(column: pa.ChunkedArray, name: str, path: str) -> np.ndarray:
    """Return a column of numbers as [count], of equal lists as [count, ...], of text as [count] objects.

    Args:
        column: the values.
        name: the column's, for errors.
        path: the file's, for errors.

    Raises:
        UserError: lists of unequal lengths, or empty values.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    shape: list[int] = [len(array)]
    if isinstance(array.type, pa.FixedShapeTensorType):
        shape, array = [len(array), *array.type.shape], array.storage.flatten()
    while _is_list(array.type) and not array.null_count:
        fixed = pa.types.is_fixed_size_list(array.type)
        sizes = {array.type.list_size} if fixed else set(array.value_lengths().to_pylist())
        if len(sizes) != 1:
            raise UserError(f"prompts: column '{name}' of '{path}' has lists of unequal lengths; pad them")
        shape.append(sizes.pop())
        array = array.flatten()
    if array.null_count:
        raise UserError(f"prompts: column '{name}' of '{path}' has rows without a value")
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _list_size(schema: pa.Schema, name: str) -> int:
    """Return the length of a column's lists; 0 where it is not one for all rows."""
    kind = schema.field(name).type
    return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 0


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _to_arrow(array: np.ndarray) -> pa.Array:
    """Return an array [N, ...] as N values, or N nested fixed-size lists."""
    if array.ndim == 1:
        return pa.array(array.tolist() if array.dtype.kind in "OU" else array)
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    if "://" in path or not folder.is_dir():
        return ""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    tables = [entry.name for entry in entries if entry.suffix == ".parquet"]
    close = nearest(Path(path).name, [entry.name for entry in entries])  # texts and folders, too
    return close if "did you mean" in close else nearest(Path(path).name, tables)
