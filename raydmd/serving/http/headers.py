"""Headers of requests that Ray Serve itself obeys, and of answers that it adds: around its servers, outermost."""

import re
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

IMPORT_PATH = "raydmd.serving.http.headers:middlewares"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
SERVES = frozenset(
    (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"serve-multiplexed-model-id")
)

Header = tuple[bytes, bytes]


class ServesHeaders:
    """ASGI middleware: takes what Ray Serve would obey out of a stranger's request.

    With these headers a client could set its own timeout, choose replicas, or leave something of each request in the
    router for ever; values that are not UTF-8 would end in an answer that is not JSON. An answer keeps one request id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through without them."""
        if "headers" not in scope:
            await self.app(scope, receive, send)
            return
        ids = [value for name, value in scope["headers"] if name == b"x-request-id" and REQUEST_ID.fullmatch(value)]
        kept = [each for each in scope["headers"] if each[0] != b"x-request-id" and _own(each[0]) not in SERVES]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _one_id(message.get("headers", ()))}
            await send(message)

        await self.app({**scope, "headers": [*kept, *((b"x-request-id", value) for value in ids[:1])]}, receive, answer)


def _one_id(headers: Iterable[Header]) -> list[Header]:
    kept: list[Header] = []
    for name, value in headers:
        if name.lower() != b"x-request-id" or all(before != b"x-request-id" for before, _ in kept):
            kept.append((name.lower(), value))
    return kept


def _own(name: bytes) -> bytes:
    return name.replace(b"_", b"-")  # Serve takes both


def middlewares() -> list[Middleware]:
    """Return what Serve's servers are wrapped in; called by Serve, which is told of it by `IMPORT_PATH`."""
    return [Middleware(ServesHeaders)]
