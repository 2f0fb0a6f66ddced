"""Pictures that people look at: grids, panels side by side, scatters of points."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from raydmd.atomic import write_bytes
from raydmd.models.base import Family

Pictures = Tensor | np.ndarray
Limits = tuple[float, float, float, float]
TILE = 48
GAP = 2
GREY = (128, 128, 128)
BLUE = "#2f6fde"


def to_image(picture: Pictures) -> Image.Image:
    """Return one picture [1 or 3, H, W] in [0, 1] as an 8-bit image; values outside are clipped.

    A picture that holds what is no number is grey, with a cross.
    """
    values = np.asarray(picture, dtype=np.float64)
    if not np.isfinite(values).all():
        values = np.broadcast_to(_crossed(*values.shape[-2:]), values.shape)
    return from_pixels(np.rint(values.clip(0.0, 1.0) * 255).astype(np.uint8))


def _crossed(height: int, width: int) -> np.ndarray:
    """Return a grey picture [H, W] with a white cross from corner to corner."""
    down, across = np.mgrid[0:height, 0:width] + 0.5
    ways = (down / height - across / width, down / height + across / width - 1)
    return np.where(np.minimum(*map(np.abs, ways)) < 0.5 / min(height, width) + 0.02, 1.0, 0.5)


def finite_samples(latents: Tensor, pictures: Tensor) -> Tensor:
    """Say of each sample whether its latents [B, ...] and what they were decoded to [B, ...] are finite: [B], bool."""
    return latents.flatten(1).isfinite().all(1).to(pictures.device) & pictures.flatten(1).isfinite().all(1)


def from_pixels(pixels: np.ndarray) -> Image.Image:
    """Return one picture [1 or 3, H, W], uint8, as an image."""
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"a picture is [1 or 3, H, W], not {list(pixels.shape)}")
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0))


def enlarge(image: Image.Image, tile: int = TILE) -> Image.Image:
    """Return a small image enlarged by a whole factor, without smoothing, so that a side has about ``tile`` pixels."""
    factor = max(1, tile // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(pictures: Pictures, columns: int = 10, tile: int = TILE) -> Image.Image:
    """Return pictures [N, 1 or 3, H, W] in [0, 1] as one image, row by row; points [N, 2] as a scatter.

    Args:
        pictures: what ``family.decode`` returns.
        columns: pictures in a row.
        tile: small pictures are enlarged, without smoothing, to about this many pixels.

    Raises:
        ValueError: none, or another shape.
    """
    if pictures.ndim == 2 and pictures.shape[1] == 2 and len(pictures):
        return scatter(pictures)
    if pictures.ndim != 4 or not len(pictures):
        raise ValueError(f"pictures are [N, 1 or 3, H, W] with N > 0, not {list(pictures.shape)}")
    tiles = [enlarge(to_image(picture), tile) for picture in pictures]
    columns = min(columns, len(tiles))
    rows, (width, height) = -(-len(tiles) // columns), tiles[0].size
    sheet = Image.new(
        tiles[0].mode,
        (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP),
        GREY[0] if tiles[0].mode == "L" else GREY,
    )
    for number, image in enumerate(tiles):
        sheet.paste(image, (number % columns * (width + GAP), number // columns * (height + GAP)))
    return sheet


def scatter(
    points: Pictures, limits: Limits | None = None, *, color: str = BLUE, size: int = 360, transparent: bool = False
) -> Image.Image:
    """Return points [N, 2] in the plane as a square image, without axes.

    Args:
        points: the points.
        limits: (left, right, bottom, top) of what is shown, so that panels can be compared; default: all of them.
        color: of the dots.
        size: of a side in pixels.
        transparent: leave the ground out, for a page that has its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.asarray(points, dtype=np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    left, right, bottom, top = limits or limits_of(values)
    figure = Figure(figsize=(size / 100, size / 100), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    axes.scatter(values[:, 0], values[:, 1], s=5, color=color, alpha=min(0.6, 600 / max(len(values), 1)), linewidths=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=transparent)
    buffer.seek(0)
    return Image.open(buffer).convert("RGBA" if transparent else "RGB")


def limits_of(points: Pictures) -> Limits:
    """Return a square (left, right, bottom, top) around those of points [N, 2] that are finite, with a margin."""
    values = np.asarray(points, dtype=np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return (-1.0, 1.0, -1.0, 1.0)
    low, high = values.min(axis=0), values.max(axis=0)
    middle, half = (low + high) / 2, max(float((high - low).max()) * 0.55, 1e-3)
    return (middle[0] - half, middle[0] + half, middle[1] - half, middle[1] + half)


def side_by_side(panels: Mapping[str, Pictures], columns: int = 10, tile: int = TILE) -> Image.Image:
    """Return titled grids next to each other, for samples of equal seeds and prompts.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("no panels to show")
    points = [pictures for pictures in panels.values() if pictures.ndim == 2]
    limits = limits_of(np.concatenate([np.asarray(each) for each in points])) if points else None
    images = {
        title: scatter(pictures, limits) if pictures.ndim == 2 else grid(pictures, columns, tile)
        for title, pictures in panels.items()
    }
    font, gap = ImageFont.load_default(16), 16
    width = sum(image.width for image in images.values()) + gap * (len(images) + 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images.values()) + 2 * gap + 24), "white")
    draw, at = ImageDraw.Draw(sheet), gap
    for title, image in images.items():
        draw.text((at, gap // 2), title, fill="black", font=font)
        sheet.paste(image.convert("RGB"), (at, gap + 24))
        at += image.width + gap
    return sheet


def png(image: Image.Image, about: Mapping[str, str] | None = None) -> bytes:
    """Return an image as PNG bytes; see `png_text` for ``about``."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, pnginfo=png_text(about or {}))
    return buffer.getvalue()


def png_text(about: Mapping[str, str]) -> PngInfo:
    """Return what a PNG says of itself, by keyword: tEXt chunks, or iTXt where Latin-1 has no letter for it."""
    info = PngInfo()
    for key, text in about.items():
        info.add_text(key, text.replace("\0", "\ufffd").encode("utf-8", "replace").decode())
    return info


def save_png(image: Image.Image, path: Path, about: Mapping[str, str] | None = None) -> Path:
    """Write an image, whole or not at all; see `png_text` for ``about``.

    Raises:
        StorageError: the disk is full or gone.
    """
    return save_file(png(image, about), path)


def save_file(content: bytes, path: Path) -> Path:
    """Write a file, whole or not at all.

    Raises:
        StorageError: the disk is full or gone.
    """
    write_bytes(path, content)
    return path


def in_plane(family: Family) -> bool:
    """Say whether a family's samples are points to be drawn in the plane."""
    return family.latent_shape == (2,)
