"""A role's part whose process kills itself as a given call begins: between that call and the one before it."""

import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raydmd.config.recipe import Recipe
from raydmd.runtime.workers.base import Factory, role_part


class Dying:
    """A part that dies as one of several calls begins, where there is the file ROLE-CALL; it removes the file first."""

    def __init__(self, part: Any, role: str, calls: Sequence[str], folder: str) -> None:
        object.__setattr__(self, "part", part)
        for call in calls:
            object.__setattr__(self, call, partial(self.call, call, Path(folder) / f"{role}-{call}"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.part, name, value)

    def call(self, method: str, mark: Path, *arguments: Any, **named: Any) -> Any:
        try:
            mark.unlink()
        except FileNotFoundError:  # another one of the role has died of it, or it is not time yet
            return getattr(self.part, method)(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)


def _make(role: str, calls: Sequence[str], folder: str, recipe: Recipe, device: str) -> Dying:
    return Dying(role_part(role, recipe, device), role, calls, folder)


def dying(role: str, calls: Sequence[str], folder: Path) -> Factory:
    """Return what builds a role's part that dies at these calls."""
    return partial(_make, role, calls, str(folder))
