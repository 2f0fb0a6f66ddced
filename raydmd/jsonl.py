"""Files of JSON lines: appended to a whole line at a time, and mended where a crash or a full disk broke one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raydmd.atomic import write_text, writing
from raydmd.errors import StorageError


class LineWriter:
    """Appends records to a file of JSON lines.

    Args:
        path: the file; it is made if it is not there.

    Raises:
        StorageError: the disk is full or gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; where it cannot be written whole, nothing of it is left.

        Raises:
            StorageError: the disk is full or gone, or the file was removed.
        """
        line, size = json.dumps(record).encode() + b"\n", os.fstat(self._file.fileno()).st_size
        with writing(self.path):
            try:
                left = memoryview(line)
                while left:
                    left = left[self._file.write(left) or 0 :]
            except OSError:
                self._file.truncate(size)
                raise
        if not os.fstat(self._file.fileno()).st_nlink:
            raise StorageError(f"{self.path}: it was removed while the run wrote to it")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def mend_lines(
    path: Path, wanted: Callable[[dict[str, Any]], bool | None] = lambda record: True, key: str | None = None
) -> int:
    """Rewrite a file of JSON lines without those that are broken or not wanted; return how many were broken.

    Args:
        path: the file; nothing is done where it is not there.
        wanted: says of a record whether it stays; None: it is no record of this file, and counts as broken.
        key: of records with an equal value under it only the last stays.

    Raises:
        StorageError: the disk is full or gone.
    """
    if not path.is_file():
        return 0
    records, broken = read_whole_lines(path)
    judged = [(record, wanted(record)) for record in records]
    broken += sum(stays is None for _, stays in judged)
    kept = [record for record, stays in judged if stays]
    if key is not None:
        kept = list({record[key]: record for record in kept}.values())
    content = path.read_bytes()
    if len(kept) < len(records) or broken or not (content.endswith(b"\n") or not content):
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return broken


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return a JSON-lines file's records; lines that a crash or a damaged disk broke are left out."""
    return read_whole_lines(path)[0]


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a JSON-lines file's records, and the number of lines that are none."""
    if not path.is_file():
        return [], 0
    records, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line.decode()) if line.strip() else None
        except (ValueError, RecursionError):
            record = line
        if isinstance(record, dict):
            records.append(record)
        elif record is not None or line.strip():
            broken += 1
    return records, broken
