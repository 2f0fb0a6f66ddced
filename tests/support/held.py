"""A role's part that is held at one method while there is a file: a moment of a run, for as long as a test needs it."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from raydmd.runtime.workers.base import Factory, make_part


class Held:
    """A part whose ``method`` waits while there is the file hold-<method>; it then writes the file held-<method>.

    What it writes, and at each call to at-<method>, is the number of updates that the part has made, if it is trained.
    """

    def __init__(self, part: Any, method: str, folder: str) -> None:
        object.__setattr__(self, "part", part)
        object.__setattr__(self, "folder", Path(folder))
        object.__setattr__(self, method, partial(self.call, method))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.part, name, value)

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        self.tell(f"at-{method}")
        while (self.folder / f"hold-{method}").exists():
            self.tell(f"held-{method}")
            time.sleep(0.01)
        return getattr(self.part, method)(*arguments, **named)

    def tell(self, name: str) -> None:
        whole = self.folder / f"{name}.{os.getpid()}"
        whole.write_text(str(getattr(self.part, "updates", "")))
        whole.rename(self.folder / name)


def _make(kind: type, method: str, folder: str, recipe: Any, device: str) -> Held:
    return Held(make_part(kind, recipe, device), method, folder)


def held(kind: type, method: str, folder: Path) -> Factory:
    """Return what builds a part of this kind that the files in ``folder`` hold."""
    return partial(_make, kind, method, str(folder))
