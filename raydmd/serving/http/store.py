"""Files kept for a while in this process's memory."""

import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """A file's bytes, their media type, and when (`time.monotonic`) they are forgotten."""

    data: bytes
    media_type: str
    until: float


class Store:
    """Keeps files by name; the oldest make room for new ones.

    Args:
        most_bytes: kept in all.
        seconds: for which a file is kept.
    """

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self.most_bytes, self.seconds = most_bytes, seconds
        self.bytes = 0
        self._files: OrderedDict[str, Kept] = OrderedDict()

    def put(self, files: dict[str, bytes], media_type: str) -> bool:
        """Keep files; return False, and keep none, if they are larger than all that is kept."""
        size = sum(len(data) for data in files.values())
        if size > self.most_bytes:
            return False
        self._forget(self.most_bytes - size)
        for name, data in files.items():
            self._files[name] = Kept(data, media_type, time.monotonic() + self.seconds)
        self.bytes += size
        return True

    def get(self, name: str) -> Kept | None:
        """Return a file that is kept still."""
        self._forget(self.most_bytes)
        return self._files.get(name)

    def remove(self, name: str) -> None:
        """Forget a file, if it is there."""
        if (kept := self._files.pop(name, None)) is not None:
            self.bytes -= len(kept.data)

    def _forget(self, most_bytes: int) -> None:
        """Forget what is too old, and the oldest above ``most_bytes``."""
        now = time.monotonic()
        while self._files and (self.bytes > most_bytes or next(iter(self._files.values())).until <= now):
            _, kept = self._files.popitem(last=False)
            self.bytes -= len(kept.data)
