"""The page at ``/docs``: Swagger UI over ``/openapi.json``, all of its files from here."""

import gzip
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from raydmd.serving.http.openapi import Operation

HERE = Path(__file__).parent
FILES = {  # by address, below /docs/; those that end in .gz are kept compressed
    "docs.js": (HERE / "docs.js", "text/javascript"),
    "swagger-ui-bundle.js": (HERE / "swagger" / "swagger-ui-bundle.js.gz", "text/javascript"),
    "swagger-ui.css": (HERE / "swagger" / "swagger-ui.css.gz", "text/css"),
}
POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self' 'unsafe-inline'", "img-src 'self' data: blob:",
    "font-src 'self' data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
])  # fmt: skip
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}


class Docs:
    """The page and its files."""

    def operations(self) -> list[Operation]:
        """Return its routes."""
        files = [Operation("GET", f"/docs/{name}", _file(*FILES[name]), shown=False, open=True) for name in FILES]
        return [Operation("GET", "/docs", self.show, shown=False, open=True), *files]

    async def show(self, request: Request) -> Response:
        """``GET /docs``."""
        headers = HEADERS | {"content-security-policy": POLICY}
        return Response((HERE / "docs.html").read_bytes(), 200, headers, "text/html; charset=utf-8")


def _file(path: Path, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        data, headers = path.read_bytes(), dict(HEADERS)
        if path.suffix == ".gz":
            headers["vary"] = "accept-encoding"
            if "gzip" in request.headers.get("accept-encoding", ""):
                headers["content-encoding"] = "gzip"
            else:
                data = gzip.decompress(data)
        return Response(data, 200, headers, media_type)

    return serve
