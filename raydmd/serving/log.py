"""What a server says: replicas write to one file, and the command that started them repeats it on stderr."""

import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TextIO

LOOK = 0.2  # seconds, between two looks at what was written
COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ERROR = re.compile(r"(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)): (.+)")


def default_file(port: int) -> Path:
    """Return where a server's log is kept: XDG_STATE_HOME, else ~/.local/state, else the place of temporary files."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = Path(home) / "raydmd"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (file := folder / f"serve-{port}.log").open("a").close()
    except OSError:
        file = Path(tempfile.mkdtemp(prefix="raydmd-log-")) / f"serve-{port}.log"
    return file


def write_log(file: str | None) -> None:
    """Write what this replica logs to the end of a file, which may be renamed meanwhile; None: as logging is set up."""
    logger = logging.getLogger("raydmd.serving")
    if file is None or any(isinstance(handler, WatchedFileHandler) for handler in logger.handlers):
        return
    handler = WatchedFileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@contextmanager
def repeated(file: Path, stream: TextIO) -> Iterator[None]:
    """Write to a stream what is written to a file for the time of the block."""
    stopped = threading.Event()
    source = file.open(encoding="utf-8", errors="replace")
    source.seek(0, os.SEEK_END)

    def repeat() -> None:
        with source:
            while True:
                last = stopped.wait(LOOK)
                if text := source.read():
                    try:
                        stream.write(text)
                        stream.flush()
                    except (OSError, ValueError):  # nobody reads it any more: the file has it
                        return
                if last:
                    return

    thread = threading.Thread(target=repeat, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(5)


def cause_of(text: str) -> tuple[str, str]:
    """Return what ended in a long message of Ray's: the last error's class, and its words, without colours."""
    lines = [line.strip() for line in COLOUR.sub("", text).splitlines() if line.strip()]
    for line in reversed(lines):
        if match := ERROR.fullmatch(line):
            return match[1], match[2]
    return "", lines[-1] if lines else "no reason is given"
