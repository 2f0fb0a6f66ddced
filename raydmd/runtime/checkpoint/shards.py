"""A dictionary of arrays as a safetensors file, in pieces: nothing else of its size is held in memory."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

PIECE = 16 * 2**20
CODES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<c8": "C64", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
    "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8", "|b1": "BOOL",
}  # fmt: skip


class LabelledTensors(dict[str, np.ndarray]):
    """Arrays by name, and the file's ``__metadata__``: what is written from them and read again is the same bytes."""

    def __init__(self, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)

    def __reduce__(self) -> tuple[type, tuple[dict[str, np.ndarray], dict[str, str]]]:
        """Be sent between actors with the arrays out of band, as those of a plain dictionary are."""
        return LabelledTensors, (dict(self), self.metadata)


def load_tensors(content: bytes) -> dict[str, np.ndarray]:
    """Read a safetensors file: `LabelledTensors` where it has metadata.

    Raises:
        safetensors.SafetensorError: it is not one.
    """
    tensors = safetensors.numpy.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__")
    return LabelledTensors(tensors, metadata) if metadata else tensors


def pieces(tensors: Mapping[str, np.ndarray]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file, at most PIECE at a time; the library writes whole files only.

    Args:
        tensors: arrays of any shape and of the types in CODES; `LabelledTensors` come with their metadata.

    Raises:
        TypeError: an array of another type.
    """
    arrays = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # the largest first keeps all of them aligned
    metadata = tensors.metadata if isinstance(tensors, LabelledTensors) else {}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in names:
        array = arrays[name]
        code = CODES.get(array.dtype.newbyteorder("<").str)
        if code is None:
            raise TypeError(f"{name}: a checkpoint holds no arrays of {array.dtype}")
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        array = arrays[name].astype(arrays[name].dtype.newbyteorder("<"), order="C", copy=False)
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, PIECE):
            yield flat[start : start + PIECE].data
