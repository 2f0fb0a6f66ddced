"""The HTTP API on a real server on loopback, in a thread of its own."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from raydmd.serving.http import make_app
from raydmd.serving.local import local_pipeline
from raydmd.serving.pipeline import Pipeline
from raydmd.serving.settings import Serving, parse_serving

DEADLINE = 180.0  # seconds, for what a test waits for on a loaded machine
LONG = 200_000  # steps of a teacher that is never done while a test runs


def until(condition: Callable[[], Any], what: str) -> None:
    """Poll until it holds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not in {DEADLINE:g} s: {what}"
        time.sleep(0.01)


@contextmanager
def server(app: ASGIApp) -> Iterator[str]:
    """Serve an app; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: uvicorn_server.started or not thread.is_alive(), "the server starts")
            yield f"http://127.0.0.1:{port}"
        finally:
            uvicorn_server.should_exit = True
            thread.join(DEADLINE)
            assert not thread.is_alive()


@contextmanager
def api(run: Path, *keys: str, **settings: Any) -> Iterator[tuple[str, Pipeline]]:
    """Serve a run from this process; yield the address and what makes the pictures."""
    serving: Serving = parse_serving({"run": str(run), "name": "tiny", **settings}, "test")
    backend = local_pipeline(serving)
    with server(make_app(backend, serving, frozenset(keys))) as url:
        yield url, backend


def connect(url: str) -> socket.socket:
    """Open a plain connection to a server."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE)


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """Return a POST as it goes over the wire."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw
