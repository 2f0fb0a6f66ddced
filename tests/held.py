"""A role's part that is held at one method while there is a file: a moment of a run, for as long as a test needs it."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from raydmd.runtime.workers import Factory, make_part


class Held:
    """A part whose ``method`` waits while there is the file hold-<method>; it then writes the file held-<method>.

    What it writes is the number of updates that the part has made, for one that is trained.
    """

    def __init__(self, part: Any, method: str, folder: str) -> None:
        object.__setattr__(self, "part", part)
        object.__setattr__(self, "hold", Path(folder, f"hold-{method}"))
        object.__setattr__(self, "held", Path(folder, f"held-{method}"))
        object.__setattr__(self, method, partial(self.call, method))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.part, name, value)

    def call(self, method: str, *arguments: Any) -> Any:
        while self.hold.exists():
            whole = self.held.with_suffix(f".{id(self)}")
            whole.write_text(str(getattr(self.part, "updates", "")))
            whole.rename(self.held)
            time.sleep(0.01)
        return getattr(self.part, method)(*arguments)


def _make(kind: type, method: str, folder: str, recipe: Any, device: str) -> Held:
    return Held(make_part(kind, recipe, device), method, folder)


def held(kind: type, method: str, folder: Path) -> Factory:
    """Return what builds a part of this kind that the files in ``folder`` hold."""
    return partial(_make, kind, method, str(folder))
