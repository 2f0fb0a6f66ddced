"""Server-sent events."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from raydmd.serving.http.errors import ClientGone, as_api_error
from raydmd.serving.http.reading import while_there, within

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else proxies gather events
]


class EventStream:
    """An answer in events, as they come. What fails before the first is an answer of its own; later, an event.

    Args:
        events: an asynchronous generator of names and data (JSON); closed when the client leaves.
        seconds: that it may take.
    """

    def __init__(self, events: AsyncGenerator[tuple[str, bytes], None], seconds: float) -> None:
        self.events, self.seconds = events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await while_there(receive, self._send(scope, send))

    async def _send(self, scope: Scope, send: Send) -> None:
        started = False
        try:
            async with within(self.seconds), aclosing(self.events) as events:
                async for name, data in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": event(name, data), "more_body": True})
        except ClientGone:
            raise
        except Exception as error:
            if not started:
                raise
            told = as_api_error(error, scope["raydmd.request_id"])
            scope["raydmd.status"] = told.status
            body = event("error", json.dumps({"type": "error", **told.body()}).encode())
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(name: str, data: bytes) -> bytes:
    """Return an event's bytes; its data are a JSON object of one line whose ``type`` is its name, as OpenAI's are."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)
