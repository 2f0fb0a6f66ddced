"""Safetensors files read by their headers alone: names, dtypes, shapes and places of tensors, never the whole file."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError

HEADER_LIMIT_BYTES = 100_000_000  # the format's own
LFS_POINTER = b"version https://git-lfs"
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in a header.

    Attributes:
        dtype: the format's name of it, e.g. ``BF16``.
        shape: its sizes.
        begin: its first byte in the file.
        end: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
        tensors: entries by name, in the file's order.
        text: the header as it is in the file, JSON.
        size_bytes: of the whole file.
    """

    tensors: dict[str, TensorEntry]
    text: bytes
    size_bytes: int


def read_header(file: Path) -> Header:
    """Read a file's header and hold it against the file's size.

    Raises:
        UserError: ``teacher.path: ...``: no such file, cut short, a Git LFS pointer, or of another format.
    """
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise UserError(f"teacher.path: {file} is a Git LFS pointer, not the weights; fetch them with git lfs")
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or not 2 <= length <= HEADER_LIMIT_BYTES or length > size_bytes - 8:
                raise UserError(f"teacher.path: {file} is not a safetensors file, or is cut short")
            stream.seek(8)
            text = stream.read(length)
        tensors = dict(_entries(text, 8 + length))
    except OSError as error:
        raise UserError(f"teacher.path: {file} is not readable: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"teacher.path: {file} is not a safetensors file: its header is not one") from error
    needed_bytes = max((entry.end for entry in tensors.values()), default=8 + length)
    if needed_bytes != size_bytes:
        what = "it is cut short" if size_bytes < needed_bytes else "something follows its last tensor"
        raise UserError(f"teacher.path: {file} has {size_bytes} bytes, not {needed_bytes}: {what}")
    return Header(tensors, text, size_bytes)


def _entries(text: bytes, data_begin: int) -> Iterator[tuple[str, TensorEntry]]:
    """Yield a header's entries.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    for name, entry in json.loads(text).items():
        if name == "__metadata__":
            continue
        (begin, end), shape = entry["data_offsets"], tuple(int(size) for size in entry["shape"])
        bits = math.prod(shape) * ITEM_BITS.get(entry["dtype"], 0)
        if not 0 <= begin <= end or (bits and (end - begin) * 8 != bits):
            raise ValueError(f"{name}: its bytes do not go with its shape")
        yield name, TensorEntry(entry["dtype"], shape, data_begin + begin, data_begin + end)
