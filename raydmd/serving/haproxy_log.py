"""What HAProxy answers by itself (400, 408, 503 ...), told in the server's log as the API tells what it answers."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("raydmd.serving.haproxy")

SOCKET = "log.sock"  # in HAProxy's folder; it drops what nobody takes
LOOK_S = 0.2
# Nothing of what a replica has answered: the API has told that. Nor that all are refused for a while: the refusal
# that began it is told, and thousands of others a second would fill a disk.
RULES = """    http-request set-var(txn.id) req.hdr(x-request-id)
    http-request set-var(txn.path) path
    http-response set-log-level silent
    log-format '{"event": "request", "request_id": "%[var(txn.id),json(utf8s)]", "client": "%ci", "method": "%HM", "route": "%[var(txn.path),json(utf8s)]", "status": %ST, "ms": %Ta, "by": "haproxy", "ended": "%tsc"}'
"""  # noqa: E501


def log_target(folder: Path) -> str:
    """Return where the HAProxy of a folder logs, as Ray's file for it takes that."""
    return f"{folder / SOCKET} format raw"


@contextmanager
def proxy_log(folder: Path) -> Iterator[None]:
    """While inside, log what HAProxy answers by itself, a line of JSON a request; 5xx are warnings.

    Args:
        folder: of HAProxy's files.
    """
    stopped = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken:
        taken.bind(str(folder / SOCKET))
        taken.settimeout(LOOK_S)

        def take() -> None:
            while not stopped.is_set():
                try:
                    _tell(taken.recv(65536))
                except TimeoutError:
                    pass

        thread = threading.Thread(target=take, name="haproxy-log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def _tell(message: bytes) -> None:
    try:
        line = json.loads(message)
    except ValueError:
        return  # of HAProxy's own health: starts, checks
    if isinstance(line, dict) and line.get("event") == "request":
        level = logging.WARNING if line["status"] >= 500 else logging.INFO
        logger.log(level, "%s", json.dumps({name: value for name, value in line.items() if value not in ("", "-")}))
