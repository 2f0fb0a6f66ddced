"""A manifest as a record: its values, its checksum, and how a file is read that may hold anything."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any

FORMAT = 4
UPGRADED = 3  # the older format that can be read, too


@dataclass(frozen=True)
class Manifest:
    """What the run was when ``iteration`` iterations had been committed.

    Attributes:
        iteration: iterations committed; the next one has this number.
        phase: index of the phase that the next iteration belongs to; the number of phases when all is done.
        updates: updates made, by trained role.
        cursors: samples taken from each stream of prompts. With the seed it says which rows come next
            (`raydmd.data.row_order`).
        seed: the recipe's seed.
        experts: finished experts.
        files: shard name (a trained role, "expert-0", ...) to {"path", "sha256", "bytes"}.
        format: number of this record's layout.
        teacher: the teacher's fingerprint; "" where none was taken.
        initial: that of ``method.init``; "" where there is none, or none was taken.
        writer: the token of the driver that wrote it.
    """

    iteration: int
    phase: int
    updates: dict[str, int]
    cursors: dict[str, int]
    seed: int
    experts: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    teacher: str = ""
    initial: str = ""
    writer: str = ""


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's values with their checksum."""
    content = {name: value for name, value in tree.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(content: bytes) -> dict[str, Any]:
    """Read a manifest's values, believing nothing: what is no whole record is a ValueError.

    One of an older version has no checksum; its values come without, so that it is told from a broken one.
    """
    tree = json.loads(content)
    if not isinstance(tree, dict):
        raise ValueError("it is not a record")
    number = tree.get("format")
    if type(number) is not int or number < 1:
        raise ValueError(f"format {number}, {FORMAT} expected")
    if number < FORMAT and "sha256" not in tree:
        return tree
    if tree.pop("sha256", None) != sealed(tree)["sha256"]:
        raise ValueError("its checksum differs")
    return tree


def upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a manifest of format 3, whose roles and streams had keys of their own, in today's format.

    Raises:
        KeyError: it lacks one of them.
    """
    tree = {**tree, "format": FORMAT}
    tree["updates"] = {role: tree.pop(f"{role}_version") for role in ("generator", "fake")}
    tree["cursors"] = {stream: tree.pop(f"{stream}_cursor") for stream in ("fake", "generator")}
    return tree


def parse_manifest(tree: dict[str, Any]) -> Manifest:
    """Read a manifest's values: what is not exactly one is a ValueError, TypeError or KeyError."""
    manifest = Manifest(**(upgraded(tree) if tree.get("format") == UPGRADED else tree))
    for each in fields(Manifest):
        value = getattr(manifest, each.name)
        if each.type is int and (type(value) is not int or value < 0):
            raise ValueError(f"{each.name} is {value!r}")
        if each.type is str and not isinstance(value, str):
            raise ValueError(f"{each.name} is {value!r}")
    if not isinstance(manifest.files, dict):
        raise ValueError("its files are not a record")
    for name in ("updates", "cursors"):
        counts = getattr(manifest, name)
        if not isinstance(counts, dict) or any(type(value) is not int or value < 0 for value in counts.values()):
            raise ValueError(f"{name} is {counts!r}")
    for name, record in manifest.files.items():
        check_record(name, record)
    for index in range(manifest.experts):
        if f"expert-{index}" not in manifest.files:
            raise ValueError(f"it names no expert-{index}")
    return manifest


def check_record(name: str, record: Any) -> None:
    """See that a value is the record of a shard, inside the archive: if not, a ValueError, TypeError or KeyError."""
    path = record["path"]
    if not (isinstance(path, str) and isinstance(record["sha256"], str) and type(record["bytes"]) is int):
        raise ValueError(f"{name}: not a record of a file")
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{name}: {path!r} leads out of the folder")
