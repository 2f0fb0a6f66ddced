"""The index of a run's experts: written last, so that who follows the folder knows when all of it is there.

``experts/index.json`` has each file's size and hash. A folder whose files are not those is being written or copied, or
is broken. Runs of before have none.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from raydmd.atomic import write_text
from raydmd.errors import UserError
from raydmd.runs.folders import expert_file

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A file as it was written: bytes, and their SHA-256."""

    bytes: int
    sha256: str


Index = dict[str, Entry]
"""Entries by path below the run's folder, as ``experts/phase-1/model.safetensors``."""


def index_file(folder: Path) -> Path:
    """Return where the index is."""
    return folder / "experts" / "index.json"


def write_index(folder: Path) -> None:
    """Write the index of all experts that a run's folder has: at once, and over the one of before."""
    entries = {}
    for index in range(len(list((folder / "experts").glob("phase-*")))):
        if (file := expert_file(folder, index)).is_file():
            entries[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    text = json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n"
    target = index_file(folder)
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return
    write_text(target, text)


def read_index(folder: Path) -> Index | None:
    """Return the index; None: there is none.

    Raises:
        UserError: it is no index.
    """
    try:
        said = json.loads(index_file(folder).read_text(encoding="utf-8"))
        return {str(name): Entry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in said["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index_file(folder)} is no index of experts ({error})") from None


def check_expert(folder: Path, index: Index, number: int, content: bool) -> None:
    """Refuse an expert's file that is not the one of the index.

    Args:
        folder: the run's.
        index: its index.
        number: of the expert, 0 for the first.
        content: compare the hash, too.

    Raises:
        UserError: it is missing, shorter, longer or another.
    """
    file = expert_file(folder, number)
    entry = index.get(str(file.relative_to(folder)))
    if entry is None:
        raise UserError(f"{index_file(folder)} does not have {file.relative_to(folder)}: it is not whole yet")
    check_entry(file, entry, "its index", content)


def check_entry(file: Path, entry: Entry, by: str, content: bool) -> None:
    """Refuse a file that is not as it was written.

    Args:
        file: the file.
        entry: what it was.
        by: what says so, in words.
        content: compare the hash, too.

    Raises:
        UserError: it is missing, shorter, longer or another.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    if size != entry.bytes:
        raise UserError(f"{file} has {size} bytes, and {entry.bytes} by {by}: it is not whole")
    if content and sha256_of(file) != entry.sha256:
        raise UserError(f"{file} is not the file of {by} (other SHA-256): it is not whole, or of another run")


def sha256_of(file: Path) -> str:
    """Return a file's SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
