"""Reading a request no further than is allowed, and working for a client only while it is there."""

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from raydmd.serving.http.errors import ApiError, ClientGone
from raydmd.serving.http.schemas import FIRST_FRAME

T = TypeVar("T")

FIELDS = 32  # of a form
PART = re.compile(r"(\w{1,100})\[(\w{1,100})\]", re.ASCII)


async def read_body(request: Request, most: int) -> bytes:
    """Return the request's body.

    Raises:
        ApiError: 413 as soon as it is known to be above ``most`` bytes; the rest is not read.
        ClientGone: the client left.
    """
    too_large = ApiError(
        413, f"the body is larger than {most} bytes", code="request_too_large", headers={"connection": "close"}
    )
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and (len(said) > 18 or int(said) > most):
        raise too_large
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > most:
            raise too_large
        more = message.get("more_body", False)
    return bytes(body)


def media_type(request: Request) -> str:
    """Return the body's media type, in small letters, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def must_be_json(request: Request, also: tuple[str, ...] = ()) -> None:
    """Refuse a body that says to be something else.

    Raises:
        ApiError: 415. A form sent by a page of another site, which browsers send unasked, ends here, too.
    """
    kind = media_type(request)
    if kind != "application/json" and kind not in also:
        given = f"not '{kind[:100]}'" if kind else "and say so"
        raise ApiError(415, f"send JSON, {given} (header 'content-type: application/json')", code="content_type")


async def read_form(request: Request, body: bytes, file: str) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields of a form that was read already, and the file in it.

    Fields of the form ``NAME[KEY]`` become an object.

    Args:
        request: says how the form is written.
        body: the form.
        file: the name of the one field that may be a file.

    Raises:
        ApiError: 400, it is malformed, in another encoding than UTF-8, or another field is a file.
    """
    charset = parse_options_header(request.headers.get("content-type"))[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"utf8"):
        raise ApiError(400, f"forms are read as UTF-8, not '{charset[:50].decode('ascii', 'replace')}'", code="charset")

    async def again() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    fields: dict[str, Any] = {}
    data: bytes | None = None
    async with Request(request.scope, again).form(max_files=1, max_fields=FIELDS, max_part_size=len(body) + 1) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != file:
                    raise ApiError(400, f"{name[:100]}: it is a file; {FIRST_FRAME}", name[:100], "file")
                data = await value.read() or (b"" if value.filename else None)  # a browser's form without a file
            elif name == file and not value:
                continue
            elif (part := PART.fullmatch(name)) and isinstance(fields.setdefault(part[1], {}), dict):
                fields[part[1]][part[2]] = value
            else:
                fields[name] = value
    return fields, data


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """End the block when its time is over.

    Raises:
        ApiError: 408.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise ApiError(408, f"it was not done in {seconds:g} s", code="timeout") from None
        raise


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` does; cancel it when the client leaves, and end when it has ended.

    Ray Serve's own proxy cancels the call of a client that left; other servers send ``http.disconnect``.

    Args:
        receive: of a request whose body was read.
        work: what to do.

    Raises:
        ClientGone: the client left.
    """
    try:
        async with asyncio.timeout(None) as there:  # not until a time, but until somebody says that it is over
            gone = asyncio.ensure_future(_disconnect(receive))
            gone.add_done_callback(partial(_end, there))
            try:
                return await work
            finally:
                gone.cancel()
    except TimeoutError:
        if there.expired():
            raise ClientGone from None
        raise


def _end(there: asyncio.Timeout, gone: asyncio.Future[None]) -> None:
    if not gone.cancelled():
        with suppress(RuntimeError):  # the work ended in the same turn
            there.reschedule(0.0)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
