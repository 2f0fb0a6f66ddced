"""Pages of other origins, where they are let in: browsers ask first (CORS), and are answered here."""

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

EXPOSED = ("x-request-id", "openai-processing-ms", "retry-after")


def cross_origin(origins: list[str]) -> list[Middleware]:
    """Return what answers browsers for pages of ``origins``; nothing where there are none.

    It goes outside of the keys, since a browser asks before it sends one. Cookies are not let in: there are none.
    """
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    ]  # fmt: skip


def may_send_forms(request: Request, origins: list[str]) -> bool:
    """Say whether a form may come from where it does: browsers send them to anybody, unasked."""
    if request.headers.get("sec-fetch-site") != "cross-site":
        return True
    return "*" in origins or request.headers.get("origin") in origins
