"""The sizes of a run's samples, as a recipe gives them: a list, or the name of one in ``bucket_lists.yaml``."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raydmd.errors import nearest
from raydmd.strict_yaml import StrictLoader

KEY = "prompts.buckets"
FORM = "[height, width] or [frames, height, width] in pixels, or {size: ..., weight: ...}"


@cache
def shipped_buckets() -> dict[str, list[list[int]]]:
    """Return the sizes of every list that ships, by its name."""
    text = Path(__file__).with_name("bucket_lists.yaml").read_text(encoding="utf-8")
    return {name: entry["sizes"] for name, entry in yaml.load(text, Loader=StrictLoader).items()}  # noqa: S506


def read_buckets(value: Any) -> list[dict[str, Any]] | None:
    """Return buckets as ``{"size": [...], "weight": ...}`` each, of all forms in which a recipe may give them.

    A name becomes the list itself, so that a run's folder says the sizes.

    Raises:
        ValueError: no list of that name, an empty one, or an entry that is none or is there twice; one line.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value not in (shipped := shipped_buckets()):
            raise ValueError(f"no list of buckets '{value}'{nearest(value, shipped)}")
        value = shipped[value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"a list of sizes is needed, or a name: {', '.join(shipped_buckets())}")
    if not value:
        raise ValueError("at least one size is needed; null: the model's own")
    found: list[dict[str, Any]] = []
    for number, entry in enumerate(value):
        bucket = _read_bucket(f"{KEY}.{number}", entry)
        for other, known in enumerate(found):
            if known["size"] == bucket["size"]:
                raise ValueError(f"{KEY}.{number}: {bucket['size']} is {KEY}.{other} already; weight draws it oftener")
        found.append(bucket)
    return found


def _read_bucket(where: str, entry: Any) -> dict[str, Any]:
    if hasattr(entry, "model_dump"):  # a bucket that was read already
        entry = entry.model_dump()
    given = entry if isinstance(entry, dict) else {"size": entry}
    for key in given:
        if key not in ("size", "weight"):
            raise ValueError(f"{where}: unknown key '{key}'{nearest(str(key), ('size', 'weight'))}")
    size, weight = given.get("size"), given.get("weight", 1.0)
    if (
        not isinstance(size, list | tuple)
        or len(size) not in (2, 3)
        or not all(type(each) is int and each > 0 for each in size)
    ):
        raise ValueError(f"{where}: {FORM} is needed, whole numbers above 0, not {entry!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: the weight of {list(size)} is {weight!r}; a number above 0 is needed")
    return {"size": list(size), "weight": float(weight)}
