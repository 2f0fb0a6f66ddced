"""The sizes that a student was trained for, and the one that is asked for."""

import re
from collections.abc import Sequence

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError, nearest
from raydmd.models.base import Family
from raydmd.models.buckets import Buckets


def trained_sizes(recipe: Recipe, family: Family) -> list[Family]:
    """Return the family at each size that a run's students are trained for; the first is that of previews."""
    own = tuple(family.latent_shape)
    return [family, *(sized for sized in Buckets(recipe, family).families if tuple(sized.latent_shape) != own)]


def size_words(sized: Family) -> str:
    """Return a family's size as ``WIDTHxHEIGHT``, with the frames of a video."""
    width, height = sized.picture_size
    return f"{width}x{height}" + (f" of {sized.frames} frames" if sized.frames > 1 else "")


def choose_size(sizes: Sequence[Family], size: str | None, frames: int | None) -> Family:
    """Return the family at the size that is asked for.

    Args:
        sizes: as `trained_sizes` returns them.
        size: ``WIDTHxHEIGHT``; None: that of previews, or the first of the frames.
        frames: of a video; None: as many as previews have where the size has those, or what it has.

    Raises:
        UserError: ``--size...``, ``--frames...``: the students were not trained for it.
    """
    asked: tuple[int, int] | None = None
    if size is not None:
        if (found := re.fullmatch(r"(\d+)x(\d+)", size.strip().lower())) is None:
            raise UserError(f"--size {size}: WIDTHxHEIGHT in pixels is needed, e.g. {size_words(sizes[0]).split()[0]}")
        asked = int(found[1]), int(found[2])
    if asked is None and frames is None:
        return sizes[0]
    of_size = [each for each in sizes if asked is None or each.picture_size == asked]
    if not of_size:
        words = list(dict.fromkeys(size_words(each).split()[0] for each in sizes))
        raise UserError(f"--size {size}: the students were not trained for it{nearest(str(size), words)}")
    fitting = [each for each in of_size if each.frames == (sizes[0].frames if frames is None else frames)]
    if frames is not None and not fitting:
        made = ", ".join(dict.fromkeys(size_words(each) if each.frames > 1 else "1" for each in of_size))
        raise UserError(f"--frames {frames}: the students were not trained for it, but for {made}")
    return (fitting or of_size)[0]
