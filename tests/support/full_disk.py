"""Small disks: a tmpfs that tests fill, make room on, and take away."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of its own at ``path``, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kilobytes: int) -> None:
        """Give it so many kilobytes in all."""
        self._mount(f"remount,size={kilobytes}k")

    def protect(self, writable: bool) -> None:
        """Take away or give back the right to write, as a kernel does on an error of the disk."""
        self._mount("remount,rw" if writable else "remount,ro")

    def fill(self, left: int = 0) -> Path:
        """Fill it up but for about ``left`` bytes; return the file that does."""
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                pass
            file.truncate(max(0, file.tell() - left))
        return filler

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self.path)], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[SmallDisk]:
    """Mount a disk of so many kilobytes; skip the test where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def half_written(folder: Path) -> list[str]:
    """Return what looks half-written below a folder: parts, empty files, folders without a file."""
    found = []
    for path in folder.rglob("*"):
        part = path.name.endswith(".part") or (path.name.startswith(".") and path.is_file())
        empty = (path.is_file() and not path.stat().st_size) or (path.is_dir() and not any(path.iterdir()))
        if part or empty:
            found.append(str(path.relative_to(folder)))
    return sorted(found)
