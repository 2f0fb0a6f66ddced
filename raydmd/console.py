"""The terminal of the commands: `console` and `errors` write to it, whatever became of it, and Ray's notices do not.

Nothing here changes a process that merely imports the package: `hold_streams` is called by the commands' `main`.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

console = Console()
errors = Console(stderr=True)
_held: list[TextIO] = []  # stdout and stderr as `hold_streams` made them


class Outlet(io.FileIO):
    """A file descriptor to write to that takes everything, also when its reader is gone: what follows is dropped.

    A pipe without a reader (EPIPE), a terminal that was closed (EIO) and a full disk under a log are no reason to end
    a run of days. The descriptor itself is then pointed at the null device, so that native code finds it writable.
    """

    def write(self, data: Any, /) -> int:
        """Write ``data``, or drop it; return the number of bytes taken."""
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno(), inheritable=os.get_inheritable(self.fileno()))
            os.close(null)
            return memoryview(data).nbytes


def hold_streams() -> None:
    """Make stdout and stderr streams that never fail, for this process; descriptors that are closed get a null device.

    Else a file or socket that is opened later would get a closed stream's number, and native code would write its log
    there. Python's stderr becomes a duplicate of descriptor 2, so that `notices_to` can point that one elsewhere.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)  # the lowest number that is free
            os.set_inheritable(descriptor, True)
    for name, descriptor in (("stdout", 1), ("stderr", os.dup(2))):
        before = getattr(sys, name)
        if before is not None:
            try:
                before.flush()
            except (OSError, ValueError):
                pass
        raw = Outlet(descriptor, "w", closefd=False)
        whole = io.TextIOWrapper(
            io.BufferedWriter(raw), getattr(before, "encoding", None) or "utf-8", "backslashreplace",
            line_buffering=raw.isatty() or name == "stderr",
        )  # fmt: skip
        setattr(sys, name, whole)
        setattr(sys, f"__{name}__", whole)
        _held.append(whole)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)


def flush_streams() -> None:
    """Write out what stdout and stderr hold, and show a terminal's cursor again if a progress bar hid it."""
    if console.is_terminal:
        console.show_cursor(True)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class MadeWhenWritten(io.TextIOBase):
    """A text file that is appended to, and made, with its folder, by the first thing that is written.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        """Write text; a line is there at once."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        return self._file.write(text)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
        super().close()


@contextmanager
def _rays_logger(*handlers: logging.Handler) -> Iterator[None]:
    """While inside, have what Ray's logger says go to handlers, or without any to the root's, and not to stderr."""
    rays = logging.getLogger("ray")  # has a handler of its own, for stderr, since Ray was imported
    before = rays.handlers, rays.propagate
    rays.handlers, rays.propagate = list(handlers), not handlers
    try:
        yield
    finally:
        rays.handlers, rays.propagate = before


@contextmanager
def notices_to(file: Path) -> Iterator[TextIO | None]:
    """While inside, append to ``file`` what libraries say: their loggers, warnings and native code's stderr.

    The terminal so has the command's own lines only. Yields the open file. After an exception native code goes on
    writing there: threads of a Ray that was lost may have more to say. In a process whose streams are not held (a
    notebook, another program) only Ray's own logger is taken, and the file made when there is something to write.
    """
    if not _held:
        with MadeWhenWritten(file) as later:
            to_later = logging.StreamHandler(later)
            to_later.setFormatter(FORMAT)
            with _rays_logger(to_later):
                yield cast(TextIO, later)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    before = os.dup(2)
    os.dup2(log, 2)
    stream = io.TextIOWrapper(io.BufferedWriter(Outlet(log, "w")), "utf-8", "backslashreplace", line_buffering=True)
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    handler.setFormatter(FORMAT)
    root.addHandler(handler)
    logging.getLogger("raydmd").setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with _rays_logger():
            yield stream
        os.dup2(before, 2)
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        os.close(before)
        stream.close()
        if file.stat().st_size == 0:
            file.unlink()
