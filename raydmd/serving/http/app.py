"""The HTTP API as an ASGI app."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from raydmd.serving.contract import Backend
from raydmd.serving.http import answers
from raydmd.serving.http.cors import cross_origin
from raydmd.serving.http.docs import Docs
from raydmd.serving.http.errors import from_http
from raydmd.serving.http.images import Images
from raydmd.serving.http.jobs import Jobs
from raydmd.serving.http.keys import Keys
from raydmd.serving.http.metrics import Metrics
from raydmd.serving.http.middleware import RequestMiddleware, route_path
from raydmd.serving.http.models import Models
from raydmd.serving.http.openapi import (
    BINARY,
    RANGE,
    Description,
    Operation,
    image_events,
    image_request,
    list_query,
    path_parameter,
    video_request,
)
from raydmd.serving.http.page import Page
from raydmd.serving.http.store import Store
from raydmd.serving.http.videos import Videos
from raydmd.serving.settings import Limits, Serving


def make_app(backend: Backend, serving: Serving, keys: Iterable[str] = ()) -> FastAPI:
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
    metrics, known = Metrics(backend.queued), Keys(serving, keys)
    store = Store(serving.limits.stored_bytes, serving.limits.stored_seconds)
    jobs = Jobs(backend, serving, store, metrics)

    async def figures(request: Request) -> Response:
        """``GET /metrics``."""
        return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def described(request: Request) -> Response:
        """``GET /openapi.json``."""
        root = request.scope.get("root_path", "")
        return JSONResponse(app.openapi() | ({"servers": [{"url": root}]} if root else {}))

    images, videos = Images(backend, serving, store, metrics), Videos(backend, serving, jobs)
    operations = [
        *image_operations(images, serving.limits),
        *video_operations(videos, serving.limits),
        *model_operations(Models(backend, serving.limits)),
        Operation(
            "GET", "/metrics", figures, "metrics", "Figures for Prometheus.",
            content={"text/plain": {"schema": {"type": "string"}}}, open=True,
        ),
        Operation("GET", "/openapi.json", described, "openapi", "This description.", shown=False),
        *Docs().operations(),
        *Page().operations(),
    ]  # fmt: skip
    routes = [operation.route() for operation in operations]
    paths = list(dict.fromkeys(route.path for route in routes))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = route_path(request.scope)
        methods = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
        return from_http(error, path, paths, methods).response()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        jobs.close()

    app = FastAPI(
        openapi_url=None,  # and with it FastAPI's own pages, whose files are elsewhere
        middleware=[*cross_origin(serving.cors_origins), Middleware(RequestMiddleware, keys=known, metrics=metrics)],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
        redirect_slashes=False,  # a path with a slash too many is told the right one, as any other
    )
    app.router.routes.extend(routes)
    app.openapi = Description(backend, serving, operations, known.asked).document  # type: ignore[method-assign]
    return app


def image_operations(images: Images, limits: Limits) -> list[Operation]:
    """Return the routes of pictures."""
    return [
        Operation(
            "POST", "/v1/images/generations", images.generate, "createImage", "Make pictures of a prompt.",
            answers.ImagesAnswer, image_events(), (400, 404, 413, 415, 429), image_request(limits),
        ),
        Operation(
            "GET", "/v1/files/{name}", images.file, "getFile", "A picture that was answered as a URL.",
            content={f"image/{kind}": BINARY for kind in ("png", "jpeg", "webp")}, errors=(404, 416),
            more=lambda card: {"parameters": [path_parameter("name", "as in the URL"), RANGE]}, open=True,
        ),
    ]  # fmt: skip


def video_operations(videos: Videos, limits: Limits) -> list[Operation]:
    """Return the routes of videos."""

    def video(card: object) -> dict[str, object]:
        return {"parameters": [path_parameter("video", "the job's id")]}

    return [
        Operation(
            "POST", "/v1/videos", videos.create, "createVideo", "Begin a video: a job.", answers.Video,
            errors=(400, 403, 404, 413, 415, 429), more=video_request(limits),
        ),
        Operation(
            "GET", "/v1/videos", videos.all, "listVideos", "Videos of one's key, the newest first.",
            answers.VideosAnswer, errors=(400,), more=list_query,
        ),
        Operation("GET", "/v1/videos/{video}", videos.one, "getVideo", "How far a video is.", answers.Video,
                  errors=(404,), more=video),
        Operation("DELETE", "/v1/videos/{video}", videos.delete, "deleteVideo", "Forget a video, or leave it undone.",
                  answers.VideoDeleted, errors=(404,), more=video),
        Operation(
            "GET", "/v1/videos/{video}/content", videos.content, "getVideoContent", "The MP4 file.",
            content={"video/mp4": BINARY}, errors=(400, 404, 416),
            more=lambda card: {"parameters": [path_parameter("video", "the job's id"), RANGE]},
        ),
    ]  # fmt: skip


def model_operations(models: Models) -> list[Operation]:
    """Return the routes of what is served."""
    return [
        Operation("GET", "/v1/models", models.all, "listModels", "What is served.", answers.ModelsAnswer),
        Operation(
            "GET", "/v1/models/{model:path}", models.one, "getModel", "One of them.", answers.Model, errors=(404,),
            more=lambda card: {"parameters": [path_parameter("model", "its id, or another of its names")]},
        ),
        Operation("GET", "/health", models.health, "health", "Whether a request could be served now.",
                  answers.HealthAnswer, open=True),
    ]  # fmt: skip
