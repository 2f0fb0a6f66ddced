"""What the run's helper actors share: a heartbeat beside their calls, and starting them so that they come back."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import ray

R = TypeVar("R")

BESIDE = "beside"  # the concurrency group of calls that do not wait for the others


@dataclass(frozen=True)
class HelperHeartbeat:
    """What a helper is at.

    Attributes:
        pid: its process.
        call: the call that it is in, if any.
        progress: grows whenever it gets on: at each call's begin and at each piece of a call's work.
    """

    pid: int
    call: str | None
    progress: int


class Helper:
    """An actor beside the roles' workers, whose calls run one after another."""

    _call: str | None = None
    _progress: int = 0

    @ray.method(concurrency_group=BESIDE, max_task_retries=0)
    def heartbeat(self) -> HelperHeartbeat:
        """Say what it is at, beside its work."""
        return HelperHeartbeat(os.getpid(), self._call, self._progress)

    def advance(self) -> None:
        """Note that the call under way gets on."""
        self._progress += 1


def tracked(method: Callable[..., R]) -> Callable[..., R]:
    """Have a helper's heartbeats name this method while it runs."""

    @wraps(method)
    def call(self: Helper, *arguments: Any, **more: Any) -> R:
        before, self._call = self._call, method.__name__
        self.advance()
        try:
            return method(self, *arguments, **more)
        finally:
            self._call = before

    return call


def start_helper(kind: type, *arguments: Any, **options: Any) -> Any:
    """Start an actor that comes back, and makes its unfinished calls again, when it is killed.

    Args:
        kind: the actor's class.
        arguments: of its constructor.
        options: of the actor, e.g. ``scheduling_strategy``.
    """
    remote: Any = ray.remote  # its types do not know of concurrency groups
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, **options}
    return remote(concurrency_groups={BESIDE: 1})(kind).options(**options).remote(*arguments)
