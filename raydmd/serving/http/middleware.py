"""What is the same for all requests: who may ask, the request's id, errors, figures, a line in the log."""

import asyncio
import json
import logging
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raydmd.serving.http.errors import ClientGone, as_api_error
from raydmd.serving.http.headers import REQUEST_ID
from raydmd.serving.http.keys import Keys
from raydmd.serving.http.metrics import Metrics

log = logging.getLogger("raydmd.serving.http")

GONE = 499


def route_path(scope: Scope) -> str:
    """Return a request's path below where the API is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class RequestMiddleware:
    """ASGI middleware around the whole API.

    It puts into the scope: ``raydmd.request_id``, ``raydmd.owner`` (as `Keys.owner`) and reads from there
    ``raydmd.status``, where an answer that began well ended badly.
    """

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}".encode()
        scope["raydmd.request_id"] = request_id.decode("ascii")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"{1000 * (time.perf_counter() - began):.0f}".encode()
                more = [(b"x-request-id", request_id), (b"openai-processing-ms", took)]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            try:
                await send(message)
            except OSError:
                raise ClientGone from None

        self.metrics.in_flight.inc()
        try:
            scope["raydmd.owner"] = self.keys.owner(route_path(scope), headers.get(b"authorization", b""))
            await self.app(scope, receive, answer)
        except ClientGone:
            status = GONE
        except asyncio.CancelledError:
            status = GONE
            raise
        except Exception as error:
            told = as_api_error(error, scope["raydmd.request_id"])
            if status:
                status = told.status  # too late to say it
            else:
                await self._say(told.response(), scope, receive, answer)
        finally:
            self.metrics.in_flight.dec()
            self._record(scope, scope.get("raydmd.status", status) or GONE, time.perf_counter() - began)

    @staticmethod
    async def _say(response: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await response(scope, receive, send)
        except ClientGone:
            pass

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.ended(route, status, seconds)
        if log.isEnabledFor(logging.INFO):
            client = (scope.get("client") or [None])[0]
            line: dict[str, Any] = {
                "event": "request", "request_id": scope["raydmd.request_id"], "client": client,
                "method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 2),
            }  # fmt: skip
            log.info("%s", json.dumps(line))
