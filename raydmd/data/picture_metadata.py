"""What a folder of pictures says of each: metadata.jsonl or metadata.csv, as Hugging Face's "imagefolder" has them."""

import csv
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from raydmd.errors import UserError, nearest

FILES = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
NEIGHBOURS = 500  # names on either side of a wrong one, among which the nearest is looked for


@dataclass(frozen=True)
class Metadata:
    """The columns of N pictures, in the pictures' order.

    Attributes:
        file: that they are of.
        columns: by name, each [N, ...].
        lines: the line of the file that each picture's row ends at, from 1.
    """

    file: Path
    columns: dict[str, np.ndarray]
    lines: list[int]

    @property
    def size(self) -> int:
        """Bytes of the columns."""
        return sum(column.nbytes for column in self.columns.values())


def read_metadata(folder: Path, names: Sequence[str], columns: Sequence[str], key: str) -> Metadata:
    """Read the row of every picture.

    JSON's values keep their types; of a CSV file, a column of which all values are numbers is one of numbers.

    Args:
        folder: of the pictures.
        names: the pictures' paths in it, sorted.
        columns: those to read; further ones are left alone.
        key: of the recipe, for errors.

    Raises:
        UserError: no file or both kinds, what is not JSON lines or CSV, a column or value that is missing, a row whose
            picture is not there or has another row, a picture without a row, or values of several types.
    """
    file = _find(folder, columns, key)
    read = _json_lines if file.suffix == ".jsonl" else _csv_rows
    known, found = set(names), dict[str, tuple[int, list[Any]]]()
    try:
        for line, row in read(file, key):
            for column in (FILE_NAME, *columns):
                if column not in row:
                    place = "the header" if file.suffix == ".csv" else f"line {line}"
                    raise UserError(f"{key}: {place} of '{file}' has no '{column}'{nearest(column, row)}")
                if row[column] is None:
                    raise UserError(f"{key}: line {line} of '{file}' has no value of '{column}'")
            name = PurePosixPath(str(row[FILE_NAME])).as_posix()
            if name not in known:
                close = nearest(name, _neighbours(name, names))
                close = close if "did you mean" in close else ""
                raise UserError(f"{key}: line {line} of '{file}': '{name}' is no picture in '{folder}'{close}")
            if name in found:
                raise UserError(f"{key}: line {line} of '{file}': '{name}' has a row in line {found[name][0]} already")
            found[name] = line, [row[column] for column in columns]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}: '{file}' cannot be read: {error}") from None
    for name in names:
        if name not in found:
            raise UserError(f"{key}: '{name}' has no row in '{file}'")
    rows = [found[name] for name in names]
    made = {name: _column(name, [(line, values[place]) for line, values in rows], file, key)
            for place, name in enumerate(columns)}  # fmt: skip
    return Metadata(file, made, [line for line, _ in rows])


def metadata_columns(folder: Path, key: str) -> tuple[Path, list[str]]:
    """Return a folder's file of metadata, and the columns of its first row besides `FILE_NAME`.

    Raises:
        UserError: no file or both kinds, or its first row is not JSON or CSV.
    """
    file = _find(folder, (), key)
    try:
        _, row = next((_json_lines if file.suffix == ".jsonl" else _csv_rows)(file, key), (0, {}))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}: '{file}' cannot be read: {error}") from None
    return file, [name for name in row if name != FILE_NAME]


def _find(folder: Path, columns: Sequence[str], key: str) -> Path:
    there = [folder / name for name in FILES if (folder / name).is_file()]
    if len(there) == 2:
        raise UserError(f"{key}: '{folder}' has both {' and '.join(FILES)}; leave one of them")
    if not there:
        below = next((file.parent for name in FILES for file in sorted(folder.glob(f"*/{name}"))), None)
        hint = "" if below is None else f"; there is one in '{below}'"
        wanted = ", ".join(f"'{name}'" for name in (FILE_NAME, *columns))
        raise UserError(f"{key}: '{folder}' has no {' or '.join(FILES)} with {wanted} of each picture{hint}")
    return there[0]


def _json_lines(file: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and object."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{key}: line {number} of '{file}' is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{key}: line {number} of '{file}' is not an object {{...}}")
            yield number, row


def _csv_rows(file: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's last line and its values as text; an empty value is None."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for row in reader:
            yield reader.line_num, {name: value or None for name, value in row.items() if name is not None}


def _column(name: str, values: list[tuple[int, Any]], file: Path, key: str) -> np.ndarray:
    """Return a column [N, ...] of (line, value)."""
    numbers = _numbers([value for _, value in values]) if file.suffix == ".csv" else None
    if numbers is not None:
        return numbers
    kinds = [type(value) for _, value in values]
    if set(kinds) == {int, float}:  # JSON may have a float without a point
        kinds = [float] * len(kinds)
    if odd := next((place for place, kind in enumerate(kinds) if kind is not kinds[0]), 0):
        (line, value), other = values[odd], values[0]
        raise UserError(f"{key}: line {line} of '{file}': '{name}' is {value!r}, but in line {other[0]} {other[1]!r}")
    try:
        return np.asarray([value for _, value in values])
    except ValueError:
        raise UserError(f"{key}: '{file}': '{name}' has lists of unequal lengths; pad them") from None


def _numbers(texts: list[str]) -> np.ndarray | None:
    """Return a CSV file's column as numbers, if it is one."""
    if all(re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text) for text in texts):
        return np.asarray([int(text) for text in texts])
    try:
        return np.asarray([float(text) for text in texts])
    except ValueError:
        return None


def _neighbours(name: str, names: Sequence[str]) -> Sequence[str]:
    """Return the sorted names around a place: difflib is slow on many."""
    place = bisect_left(names, name)
    return names[max(place - NEIGHBOURS, 0) : place + NEIGHBOURS]
