"""Files that are there whole or not at all, and what is said where a disk is full or gone. Imports nothing heavy."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raydmd.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO)


def storage_error(path: Path | str, error: BaseException) -> StorageError | None:
    """Return what is said of a disk that is full or gone; None where the error is another one.

    Args:
        path: the file that was to be written or read.
        error: an `OSError`, or one of safetensors' that says it in words.
    """
    number = error.errno if isinstance(error, OSError) else None
    if not isinstance(error, OSError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number in FULL:
        return StorageError(f"{path}: {os.strerror(number or 0)}; make room, and the same command goes on")
    if number in GONE:
        return StorageError(f"{path}: {os.strerror(number or 0)}; the same command goes on when its storage is back")
    return None


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """While inside, an error of a full or lost disk is a `StorageError` that names ``path``.

    Raises:
        StorageError: a disk is full or gone.
    """
    try:
        yield
    except Exception as error:
        if (known := storage_error(path, error)) is None:
            raise
        raise known from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes ``path`` when the block ends and is removed when it fails.

    It is on the disk before it gets its name, so that a power cut leaves the file of before or the new one.

    Raises:
        StorageError: a disk is full or gone.
    """
    token = os.urandom(4).hex()  # two machines that share storage may have the same process number
    part = path.with_name(f".{path.name}.{token}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all.

    Raises:
        StorageError: a disk is full or gone.
        OSError: it may not be written.
    """
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all.

    Raises:
        StorageError: a disk is full or gone.
        OSError: it may not be written.
    """
    write_bytes(path, text.encode())


def remove_parts(folder: Path) -> None:
    """Remove from a folder the parts of files that a process which is gone has left."""
    for part in folder.glob("*.part"):
        number = part.name.removesuffix(".part").rpartition(".")[2]
        if not (number.isdigit() and part.name.startswith(".") and _lives(int(number))):
            with suppress(OSError):
                part.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()
