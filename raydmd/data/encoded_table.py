"""Embeddings of texts as a folder of Parquet files, each whole or not there: what a second run finds, and completes.

    encoded.json               what determines every row, and how the rows are cut into files
    rows-00000000.parquet      the first ``batch`` rows

The folder is a table as `raydmd.data.prompts.PromptTable` reads it. It is a path, or a URI that pyarrow.fs knows.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raydmd.atomic import write_bytes
from raydmd.data.prompts import GROUP_BYTES, to_table
from raydmd.errors import UserError

FORMAT = "raydmd-encoded-1"
INDEX_FILE = "encoded.json"
TABLE, FIRST, CUT = b"raydmd.table", b"raydmd.first", b"raydmd.cut"  # in a file's metadata
OLD_S = 3600.0  # a part of a file that is older is nobody's any more
UNREACHABLE = (OSError, pa.ArrowException, ValueError)


@dataclass(frozen=True)
class EncodedFacts:
    """All that determines the rows, besides the kind of hardware that computes them.

    Attributes:
        family: that encodes them.
        encoder: the fingerprint of its text encoders and tokenizers.
        texts: the hash of the texts, and of the pictures where those are encoded.
        rows: how many.
        batch: rows that are encoded at once, and are a file.
        columns: that the family takes.
        options: of the family, that the encoding may depend on.
    """

    family: str
    encoder: str
    texts: str
    rows: int
    batch: int
    columns: list[str]
    options: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return the content of ``encoded.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    def key(self) -> str:
        """Return a short name of it all: 32 hexadecimal digits."""
        return blake2b(self.text().encode(), digest_size=16).hexdigest()

    def difference(self, text: str) -> str | None:
        """Return in words what differs first from another folder's ``encoded.json``; None: nothing does."""
        if text == self.text():
            return None
        try:
            theirs, ours = json.loads(text), json.loads(self.text())
            names = ("format", *(each.name for each in fields(self)))
            changed = [name for name in names if theirs.get(name) != ours[name]]
        except (ValueError, AttributeError):
            return "another format"
        words = {"encoder": "another text encoder", "texts": "other texts", "options": "other teacher.options"}
        name = changed[0] if changed else "format"
        return words.get(name, f"{name}: {theirs.get(name)} there, {ours[name]} here")


@dataclass(frozen=True)
class Encoded:
    """What one has of a table.

    Attributes:
        place: the folder or URI, which `PromptTable` takes.
        rows: how many there are.
        made: how many were encoded now.
        cut: texts that are longer than the encoder reads; None where that is not known.
    """

    place: str
    rows: int
    made: int
    cut: int | None


class EncodedTable:
    """The folder of one table.

    Args:
        place: a path or a URI.
        facts: what its rows are.
        key: of the recipe or the command that names the place, for errors.

    Raises:
        UserError: the place cannot be reached.
    """

    def __init__(self, place: str, facts: EncodedFacts, key: str) -> None:
        self.place, self.facts, self.key = place, facts, key
        try:
            found = fs.FileSystem.from_uri(place) if "://" in place else (fs.LocalFileSystem(), place)
        except UNREACHABLE as error:
            raise self._unreachable(error) from None
        self.system: fs.FileSystem = found[0]
        self.root: str = found[1]
        self.local = isinstance(self.system, fs.LocalFileSystem)

    @property
    def files(self) -> int:
        """How many files there are when all are."""
        return -(-self.facts.rows // self.facts.batch)

    def span(self, number: int) -> tuple[int, int]:
        """Return the first row of a file, and the one after its last."""
        start = number * self.facts.batch
        return start, min(start + self.facts.batch, self.facts.rows)

    def claim(self) -> None:
        """Have the folder say what it is, before its first file is written.

        Raises:
            UserError: it holds other things, other rows, or cannot be written.
            StorageError: the disk is full or gone.
        """
        try:
            names = self._names()  # first: another driver may be writing the index
            found = self._read(INDEX_FILE)
            if found is None and not all(name == "run.log" or name.startswith(".") for name in names):
                raise UserError(f"{self.key}: '{self.place}' is not empty and holds no embeddings of `raydmd encode`; "
                                f"choose another folder")  # fmt: skip
            if found is not None and (difference := self.facts.difference(found.decode(errors="replace"))):
                raise UserError(f"{self.key}: '{self.place}' holds embeddings of something else ({difference}); choose "
                                f"another folder")  # fmt: skip
            if found is None:
                self._write(INDEX_FILE, self.facts.text().encode())
            self._remove_old_parts(names)
        except UNREACHABLE as error:
            raise self._unreachable(error) from None

    def said(self) -> dict[str, Any]:
        """Return what the folder says that it is, `EncodedFacts` by name; nothing where it cannot be read."""
        try:
            said = json.loads(self._read(INDEX_FILE) or b"{}")
        except UNREACHABLE:
            return {}
        return said if isinstance(said, dict) else {}

    def found(self) -> dict[int, int | None]:
        """Return the numbers of the files that are there and whole, and how many of their texts were cut.

        Raises:
            UserError: the place cannot be reached.
        """
        try:
            names = set(self._names())
        except UNREACHABLE as error:
            raise self._unreachable(error) from None
        there = [number for number in range(self.files) if file_name(number) in names]
        looked = {number: self._look(number) for number in there}
        return {number: cut for number, (whole, cut) in looked.items() if whole}

    def commit(self, number: int, content: bytes) -> None:
        """Write a file of `file_content`, whole or not at all; one that is there and whole stays.

        Another driver may have made it meanwhile, and may be reading it: its bytes must not change under it.

        Raises:
            UserError: the place cannot be written.
            StorageError: the disk is full or gone.
        """
        try:
            if not self._look(number)[0]:
                self._write(file_name(number), content)
        except UNREACHABLE as error:
            raise self._unreachable(error) from None

    def _look(self, number: int) -> tuple[bool, int | None]:
        """Return whether a file is what was written there, by its end, and how many of its texts were cut."""
        start, end = self.span(number)
        try:
            with self.system.open_input_file(f"{self.root}/{file_name(number)}") as source:
                footer = pq.read_metadata(source)
        except UNREACHABLE:
            return False, None
        kept = footer.metadata or {}
        ours = kept.get(TABLE) == self.facts.key().encode() and kept.get(FIRST) == str(start).encode()
        cut = kept.get(CUT, b"")
        return ours and footer.num_rows == end - start, int(cut) if cut.isdigit() else None

    def _names(self) -> list[str]:
        entries = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return [entry.base_name for entry in entries]

    def _read(self, name: str) -> bytes | None:
        path = f"{self.root}/{name}"
        if self.system.get_file_info(path).type != fs.FileType.File:
            return None
        with self.system.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _write(self, name: str, content: bytes) -> None:
        if self.local:
            write_bytes(Path(self.root) / name, content)
            return
        with self.system.open_output_stream(f"{self.root}/{name}", compression=None) as stream:
            stream.write(content)  # an object appears as a whole when its stream is closed

    def _remove_old_parts(self, names: list[str]) -> None:
        """Remove what drivers that were killed left half-written; another machine's may be under way."""
        for name in names if self.local else []:
            part = Path(self.root) / name
            with suppress(OSError):
                if name.startswith(".") and name.endswith(".part") and time.time() - part.stat().st_mtime > OLD_S:
                    part.unlink()

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(f"{self.key}: cannot use '{self.place}': {' '.join(str(error).split())[:200]}")


def file_name(number: int) -> str:
    """Return the name of a file."""
    return f"rows-{number:08d}.parquet"


def file_content(
    facts: EncodedFacts, number: int, rows: Mapping[str, np.ndarray | list[Any]], cut: int | None
) -> bytes:
    """Return a file: columns of equal length as Parquet.

    Floating-point values are split into their bytes' streams before zstd: those of bfloat16 take half the room, and the
    zeros of padding nearly none.

    Args:
        facts: of the table.
        number: of the file.
        rows: the columns, each [N, ...].
        cut: how many of its texts were cut; None: not known.
    """
    table = to_table(rows)
    kept = {TABLE: facts.key().encode(), FIRST: str(number * facts.batch).encode()}
    kept[CUT] = b"" if cut is None else str(cut).encode()
    group = max(1, int(GROUP_BYTES * table.num_rows / max(table.nbytes, 1)))
    sink = pa.BufferOutputStream()
    plain = pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=False, column_encoding=_encodings(table)
    )
    with plain as writer:
        writer.write_table(table, row_group_size=group)
        writer.add_key_value_metadata(kept)
    return bytes(sink.getvalue())


def _encodings(table: pa.Table) -> dict[str, str]:
    """Return the encoding of each floating-point column, by its path in Parquet."""
    found = {}
    for name, kind in zip(table.schema.names, table.schema.types, strict=True):
        path = name
        while pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        if pa.types.is_floating(kind):
            found[path] = "BYTE_STREAM_SPLIT"
    return found


def cached_place(cache: str | None, facts: EncodedFacts) -> str:
    """Return where a table is in a cache: a folder by the table's name.

    Args:
        cache: a folder or a URI; None: ``raydmd/prompts`` in the user's own cache.
        facts: of the table.
    """
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME")
        cache = str((Path(home) if home else Path.home() / ".cache") / "raydmd" / "prompts")
    folder, mark, options = cache.partition("?") if "://" in cache else (cache, "", "")
    return f"{folder.rstrip('/')}/{facts.key()}{mark}{options}"
