"""The HTTP API as an ASGI app."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from raydmd.serving.contract import Backend
from raydmd.serving.http.cors import cross_origin
from raydmd.serving.http.errors import from_http
from raydmd.serving.http.gate import Gate, route_path
from raydmd.serving.http.images import Images
from raydmd.serving.http.jobs import Jobs
from raydmd.serving.http.keys import Keys
from raydmd.serving.http.metrics import Metrics
from raydmd.serving.http.models import Models
from raydmd.serving.http.page import Page
from raydmd.serving.http.store import Store
from raydmd.serving.http.videos import Videos
from raydmd.serving.settings import Serving


def make_app(backend: Backend, serving: Serving, keys: Iterable[str] = ()) -> Starlette:
    """Return the API over a backend.

    Make it in the process that serves it: its figures, jobs and kept pictures live there, and it cannot be sent.

    Args:
        backend: makes the pictures.
        serving: the limits, and where the API keys are; with none, everybody is let in. `Keys` says which routes
            need none.
        keys: further ones.

    Raises:
        UserError: the file of keys is missing or has no key in it.
    """
    metrics = Metrics(backend.queued)
    store = Store(serving.limits.stored_bytes, serving.limits.stored_seconds)
    jobs = Jobs(backend, serving, store, metrics)
    images, models = Images(backend, serving, store, metrics), Models(backend, serving.limits)
    videos, page = Videos(backend, serving, jobs), Page()

    async def figures(request: Request) -> Response:
        """``GET /metrics``."""
        return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)

    routes = [
        Route("/v1/images/generations", images.generate, methods=["POST"]),
        Route("/v1/files/{name}", images.file),
        Route("/v1/videos", videos.create, methods=["POST"]),
        Route("/v1/videos", videos.all),
        Route("/v1/videos/{video}", videos.one),
        Route("/v1/videos/{video}", videos.delete, methods=["DELETE"]),
        Route("/v1/videos/{video}/content", videos.content),
        Route("/v1/models", models.all),
        Route("/v1/models/{model:path}", models.one),
        Route("/health", models.health),
        Route("/metrics", figures),
        Route("/", page.show),
    ]
    paths = list(dict.fromkeys(route.path for route in routes))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = route_path(request.scope)
        methods = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
        return from_http(error, path, paths, methods).response()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        jobs.close()

    app = Starlette(
        routes=routes,
        middleware=[*cross_origin(serving.cors_origins), Middleware(Gate, keys=Keys(serving, keys), metrics=metrics)],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a path with a slash too many is told the right one, as any other
    return app
