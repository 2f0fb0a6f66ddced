"""Ports that are held from the moment they are chosen, and folders for sockets, whose paths must be short."""

import errno
import os
import resource
import socket
import tempfile
from pathlib import Path
from typing import Any

from raydmd.errors import UserError

SOCKET_PATH = 107  # bytes, of a Unix socket's path (sun_path of Linux, without its last zero)


def hold_port(host: str, port: int = 0) -> socket.socket:
    """Bind a port that nobody has, and keep it: only sockets of this user with SO_REUSEPORT can share it.

    The socket does not listen, so no connection goes to it.

    Args:
        host: an address or a name of this machine.
        port: 0 for one that is free.

    Raises:
        OSError: it is taken, or ``host`` is not here.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    try:
        held = _bound(family, address, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        held = _bound(family, address, reuse=True)  # what has the port may be ended connections alone
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # bound alone, and shared from now on
    return held


def _bound(family: int, address: Any, reuse: bool) -> socket.socket:
    """Bind a socket; with ``reuse`` another that says so, too, can bind the address until one of them listens."""
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        return bound
    except OSError:
        bound.close()
        raise


def short_folder(room: int) -> Path:
    """Make a folder that this user alone can enter, for sockets whose paths in it have at most ``room`` bytes.

    It lies under XDG_RUNTIME_DIR or TMPDIR where these are short enough, else under /tmp.

    Raises:
        UserError: there is no such place.
    """
    places = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp", "/var/tmp"]
    for place in places:
        if place is None or not os.path.isabs(place) or not os.access(place, os.W_OK | os.X_OK):
            continue
        if len(os.fsencode(place)) + len("/raydmd-12345678/") + room <= SOCKET_PATH:
            return Path(tempfile.mkdtemp(prefix="raydmd-", dir=place))
    raise UserError("no folder for sockets: XDG_RUNTIME_DIR, TMPDIR and /tmp are too long or cannot be written to")


def most_connections(wanted: int, spare: int = 500) -> int:
    """Return how many clients a proxy can have at once.

    Each takes two connections and, for some, a pipe: at most 2.5 of the files that a process may open here.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return wanted
    return max(100, min(wanted, (hard - spare) * 2 // 5))
