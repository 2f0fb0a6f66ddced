"""Bytes as an answer: whole, or the range that was asked for."""

import re

from starlette.requests import Request
from starlette.responses import Response

from raydmd.serving.http.errors import ApiError

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}


def file_response(request: Request, data: bytes, media_type: str, seconds: float) -> Response:
    """Return a file that never changes under its address, or the one range that was asked for.

    Several ranges at once, and units other than bytes, are answered with the whole file, as HTTP allows.

    Raises:
        ApiError: 416, the range begins behind the file's end.
    """
    headers = {
        "accept-ranges": "bytes",
        "cache-control": f"private, max-age={int(seconds)}, immutable",
        "x-content-type-options": "nosniff",
    }
    match = RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or match.group() == "bytes=-" or "if-range" in request.headers:
        return Response(data, 200, headers, media_type)
    first, last = match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last) if first and last else len(data) - 1, len(data) - 1)
    if first and last and int(last) < int(first):
        return Response(data, 200, headers, media_type)  # no range at all: to be ignored
    if start >= len(data):
        raise ApiError(416, f"the file has {len(data)} bytes", code="range",
                       headers={"content-range": f"bytes */{len(data)}"})  # fmt: skip
    headers["content-range"] = f"bytes {start}-{end}/{len(data)}"
    return Response(data[start : end + 1], 206, headers, media_type)
