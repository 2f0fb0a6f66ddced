"""A folder of pictures at one size, as Hugging Face's "imagefolder" has it: files, and metadata with a row for each.

A picture is resized by Pillow's bicubic filter, which widens with the factor and so does not alias (Parmar et al. 2022,
clean-fid), and cut to the target's proportions around its centre. This is the usual preparation of training sets for
diffusion models (guided-diffusion's `center_crop_arr`: Dhariwal & Nichol 2021; DiT); the halvings by a box filter that
they begin with only save time, and are left out.
"""

import copy
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from raydmd.data.picture_metadata import Metadata, read_metadata
from raydmd.errors import UserError, nearest

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # by their content; no other of Pillow's decoders is tried
CACHED_BYTES = 256 * 2**20
"""Of decoded pictures, a byte a value: small folders are decoded once, of larger ones the last pictures are kept."""


class PictureFolder:
    """Pictures by number, in the order of their files' names, so that number k is the same on every machine.

    Sub-folders are read, also those that are links. Names that begin with a dot or two underscores are left out, as in
    imagefolder. The folder is read once: what is added later is not seen.

    Args:
        path: the folder, on this machine or on storage that machines share.
        shape: channels (1: grey, 3: RGB), height and width of a picture.
        columns: of the metadata, a row of which each picture then needs; without columns, none is read.
        key: of the recipe, for errors.

    Attributes:
        names: of the files, relative to the folder, sorted by code points.
        metadata: the columns, or None.

    Raises:
        UserError: no such folder, no picture in it, or what `read_metadata` refuses.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int], columns: Sequence[str], key: str) -> None:
        if shape[0] not in (1, 3):
            raise ValueError(f"pictures have 1 or 3 channels, not {shape[0]}")
        self.path, self.shape, self.key = Path(path), shape, key
        if "://" in str(path):
            raise UserError(f"{key}: '{path}' is no folder of a file system; mount it, or copy it to one")
        if not self.path.is_dir():
            raise UserError(f"{key}: no folder '{path}'{_nearest_folder(self.path)}")
        self.names = _list_pictures(self.path, key)
        if not self.names:
            raise UserError(f"{key}: folder '{path}' has no pictures ({', '.join(SUFFIXES)})")
        self.metadata: Metadata | None = read_metadata(self.path, self.names, columns, key) if columns else None
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._sizes = {shape: self}

    def resized(self, shape: tuple[int, int, int]) -> "PictureFolder":
        """Return the same pictures at another size, of as many channels; each size keeps its decoded pictures."""
        if shape not in self._sizes:
            other = copy.copy(self)
            other.shape, other._cache = shape, OrderedDict()
            self._sizes[shape] = other
        return self._sizes[shape]

    def __len__(self) -> int:
        """Return how many pictures there are."""
        return len(self.names)

    def take(self, numbers: np.ndarray) -> Tensor:
        """Return pictures by number [count], in that order: float32 [count, *shape] in [-1, 1].

        Raises:
            IndexError: a number that is no picture's.
            UserError: a file that cannot be decoded; the message names it.
        """
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"pictures 0..{len(self) - 1}, not {numbers.min()}..{numbers.max()}")
        values = np.empty((len(numbers), *self.shape), np.uint8)
        for place, number in enumerate(numbers.tolist()):
            values[place] = self._picture(number)
        return torch.from_numpy(values).float() / 127.5 - 1

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Return the metadata's columns, each [count, ...], of pictures by number [count]."""
        return {} if self.metadata is None else {n: column[numbers] for n, column in self.metadata.columns.items()}

    def where(self, number: int) -> str:
        """Say for errors which picture and which row of the metadata a number is."""
        name = f"'{self.names[number]}'"
        return (
            name if self.metadata is None else f"line {self.metadata.lines[number]} of '{self.metadata.file}', {name}"
        )

    def _picture(self, number: int) -> np.ndarray:
        """Return a picture, uint8 [C, H, W]."""
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        file = self.path / self.names[number]
        try:
            values = read_picture(file, self.shape)
        except Exception as error:  # whatever Pillow's decoders make of bytes that are not what they expect
            told = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.key}: '{file}' cannot be read as a picture: {told or type(error).__name__}"
            ) from None
        self._cache[number] = values
        while len(self._cache) > 1 and len(self._cache) * values.nbytes > CACHED_BYTES:
            self._cache.popitem(last=False)
        return values


def read_picture(
    file: Path | IO[bytes],
    shape: tuple[int, int, int],
    formats: tuple[str, ...] = FORMATS,
    most_pixels: int | None = None,
) -> np.ndarray:
    """Decode one picture, uint8 [C, H, W].

    It is turned as its EXIF orientation says. What is transparent becomes white, as img2dataset has it. Grey of 16
    bits is rounded to 8; of an animation, the first frame is taken.

    Args:
        file: a PNG, JPEG, WebP or BMP.
        shape: channels (1 or 3), height and width.
        formats: Pillow's names of those that are taken, by content.
        most_pixels: of a picture, told by its header before it is decoded; None: ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        DecompressionBombError: it has more than ``most_pixels``.
        Exception: whatever else Pillow raises of a file that is none, is cut short, or is larger than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    channels, height, width = shape
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # what Pillow warns of, it reads nonetheless
        with Image.open(file, formats=formats) as opened:
            if most_pixels is not None and opened.width * opened.height > most_pixels:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels")
            image: Image.Image = _opaque(ImageOps.exif_transpose(opened), "L" if channels == 1 else "RGB")
    values = np.asarray(
        image.resize((width, height), Image.Resampling.BICUBIC, box=_central(image.size, width, height))
    )
    return values[None] if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """Return a picture of ``mode`` (L or RGB), on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # grey of 16 bits, which Pillow would cut at 255
        grey = (np.clip(np.asarray(image), 0, 65535).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _central(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """Return the largest box (left, upper, right, lower) of the target's proportions around a picture's centre."""
    scale = min(size[0] / width, size[1] / height)
    left, upper = (size[0] - scale * width) / 2, (size[1] - scale * height) / 2
    return max(left, 0.0), max(upper, 0.0), min(size[0] - left, size[0]), min(size[1] - upper, size[1])


def _list_pictures(folder: Path, key: str) -> list[str]:
    """Return the pictures' names below a folder, sorted; each folder is read once, however many links lead to it."""
    names, seen = [], {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        raise UserError(f"{key}: cannot read '{error.filename}': {error.strerror}") from None

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        there = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders) if _is_shown(name)}
        folders[:] = [name for name, real in there.items() if real not in seen]
        seen.update(there.values())
        below = Path(place).relative_to(folder)
        names += [(below / name).as_posix() for name in files
                  if _is_shown(name) and os.path.splitext(name)[1].lower() in SUFFIXES]  # fmt: skip
    return sorted(names)


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "__"))


def _nearest_folder(path: Path) -> str:
    if path.exists():
        return ", but a file"
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    return close if "did you mean" in close else ""
