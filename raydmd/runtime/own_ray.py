"""A Ray of our own on this machine: its sockets have room."""

import os
import tempfile

SOCKET_PATH = 107  # bytes, of a Unix socket's path
SESSION = len(
    "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.12345"
)  # Ray's longest in its folder


def make_room_for_sockets() -> None:
    """Let Ray keep its files under /tmp where the path of the usual place is too long for its sockets."""
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(place)) + SESSION > SOCKET_PATH:
        os.environ["RAY_TMPDIR"] = "/tmp"
