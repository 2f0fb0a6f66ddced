"""The page at ``/``, and what its browser lets it do."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from raydmd.serving.http.errors import ApiError
from raydmd.serving.http.openapi import Operation

PAGE = Path(__file__).parent / "page" / "index.html"
STYLE = re.compile(r'<link rel="stylesheet" href="([\w.-]+)">\n')
SCRIPTS = re.compile(r'(?:<script src="[\w.-]+"></script>\n)+')


class _Inline(HTMLParser):
    """Collects the hashes of a page's scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.hashes: dict[str, list[str]] = {"script": [], "style": []}
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin to collect."""
        if tag in self.hashes:
            self._text = []

    def handle_data(self, data: str) -> None:
        """Collect."""
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Take the hash of what was collected."""
        if tag in self.hashes and self._text is not None:
            digest = b64encode(sha256("".join(self._text).encode()).digest()).decode()
            self.hashes[tag].append(f"'sha256-{digest}'")
            self._text = None


def policy(page: str) -> str:
    """Return a Content-Security-Policy: the page's own scripts and styles, this server, pictures in memory; no more."""
    inline = _Inline()
    inline.feed(page)
    inline.close()
    allowed = {kind: " ".join(hashes) or "'none'" for kind, hashes in inline.hashes.items()}
    return "; ".join([
        "default-src 'none'", f"script-src {allowed['script']}", f"style-src {allowed['style']}",
        "img-src 'self' data: blob:", "media-src 'self' data: blob:", "connect-src 'self'", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'",
    ])  # fmt: skip


def whole(path: Path) -> str:
    """Return a page with its styles and scripts, which lie beside it, in it: one answer, and one hash of each."""
    page = path.read_text(encoding="utf-8")

    def beside(names: list[str]) -> str:
        return "".join((path.parent / name).read_text(encoding="utf-8") for name in names)

    page = STYLE.sub(lambda found: f"<style>\n{beside([found[1]])}</style>\n", page)
    names = re.compile(r'src="([\w.-]+)"')
    return SCRIPTS.sub(lambda found: f"<script>\n{beside(names.findall(found[0]))}</script>\n", page)


class Page:
    """Serves a page as one file; where there is none it answers 404."""

    def __init__(self, path: Path = PAGE) -> None:
        self.body = whole(path) if path.is_file() else None
        self.headers = {
            "content-security-policy": policy(self.body or ""),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

    def operations(self) -> list[Operation]:
        """Return its routes."""
        return [Operation("GET", "/", self.show, shown=False, open=True)]

    async def show(self, request: Request) -> Response:
        """``GET /``."""
        if self.body is None:
            raise ApiError(404, "there is no page here; the API is at /v1", code="unknown_url")
        return Response(self.body, 200, self.headers, "text/html; charset=utf-8")
