"""A Ray of our own on this machine: its processes hear no signal that is sent to ours, and its sockets have room."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

SOCKET_PATH = 107  # bytes, of a Unix socket's path
SESSION = len(
    "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.12345"
)  # Ray's longest in its folder


@contextmanager
def in_a_group_of_its_own() -> Iterator[None]:
    """Start Ray's processes in process groups of their own for the time of the block.

    A signal that a terminal, a service manager or `timeout` sends to this command's group then ends this process alone,
    which ends Ray: else Ray's would be gone before the command has let go of what runs on it. They still die with
    this process, however it ends.
    """
    from ray._private import services

    module: Any = services
    before = module.ConsolePopen
    module.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        module.ConsolePopen = before


def make_room_for_sockets() -> None:
    """Let Ray keep its files under /tmp where the path of the usual place is too long for its sockets."""
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(place)) + SESSION > SOCKET_PATH:
        os.environ["RAY_TMPDIR"] = "/tmp"
