"""``/v1/images/generations`` and ``/v1/files``: pictures, whole or step by step."""

import json
import re
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from raydmd.serving.contract import Ask, Backend, Made, Maker, Step
from raydmd.serving.http.errors import ApiError, parsed
from raydmd.serving.http.files import MEDIA_TYPES, file_response
from raydmd.serving.http.metrics import Metrics
from raydmd.serving.http.raw_json import array, base64, json_with
from raydmd.serving.http.reading import must_be_json, read_body, while_there, within
from raydmd.serving.http.schemas import ImageBody, read_model, read_prompt, read_size, size_text
from raydmd.serving.http.sse import EventStream
from raydmd.serving.http.store import Store
from raydmd.serving.settings import Serving

HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?", re.ASCII)
PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
SEEDS = 2**53  # below it, every seed is a number that JavaScript can say


def new_seed() -> int:
    """Return a seed for who gave none."""
    return secrets.randbelow(SEEDS)


def milliseconds(made: Made) -> dict[str, float]:
    """Return what each stage took."""
    return {stage: round(1000 * seconds, 3) for stage, seconds in made.seconds.items()}


class Images:
    """The routes of pictures.

    Args:
        backend: makes them.
        serving: the limits.
        store: where those are kept that are answered as URLs: in this API replica's memory.
        metrics: where they are counted.
    """

    def __init__(self, backend: Backend, serving: Serving, store: Store, metrics: Metrics) -> None:
        self.backend, self.serving, self.store, self.metrics = backend, serving, store, metrics

    async def generate(self, request: Request) -> ASGIApp:
        """``POST /v1/images/generations``: an answer as OpenAI's, or its stream of events."""
        must_be_json(request)
        async with within(self.serving.timeout_seconds):
            body = parsed(ImageBody, await read_body(request, self.serving.limits.body_bytes))
        ask = self._ask(body)
        if body.response_format == "url" and self.serving.api_replicas > 1:
            raise ApiError(400, "response_format: this server has several API replicas, and a URL is known to one of "
                           "them: ask for b64_json", "response_format", "invalid_value")  # fmt: skip
        if body.stream:
            if body.response_format == "url":
                raise ApiError(400, "response_format: a stream carries pictures as b64_json alone", "response_format",
                               "invalid_value")  # fmt: skip
            return EventStream(self._events(ask, body), self.serving.timeout_seconds)
        async with within(self.serving.timeout_seconds):
            made = await while_there(request.receive, self.backend.make(ask))
        if body.response_format == "url":
            data = json.dumps(self._keep(made, ask, request)).encode()
        else:
            data = array(b'{"b64_json": %s}' % base64(picture) for picture in made.pictures)
        answer = json_with({"created": int(time.time()), **self._about(ask, made)}, data=data)
        counted = BackgroundTask(self._count, ask.maker, made)  # once it is sent: nobody waits for that
        return Response(answer, 200, media_type="application/json", background=counted)

    async def file(self, request: Request) -> Response:
        """``GET /v1/files/NAME``: a picture that was answered as a URL."""
        kept = self.store.get(f"files/{request.path_params['name']}")
        if kept is None:
            raise ApiError(404, f"no such file; files are kept for {self.serving.limits.stored_seconds:g} s at most",
                           code="file_not_found")  # fmt: skip
        return file_response(request, kept.data, kept.media_type, self.store.seconds)

    async def _count(self, maker: Maker, made: Made) -> None:
        self.metrics.made(maker, made)

    def _ask(self, body: ImageBody) -> Ask:
        card, limits = self.backend.card(), self.serving.limits
        if card.kind != "image":
            raise ApiError(400, f"'{card.name}' makes {card.kind}s: ask for them at POST /v1/videos", "model",
                           "wrong_model_kind")  # fmt: skip
        n = body.n or 1
        if n > limits.n:
            raise ApiError(
                400, f"n: at most {limits.n} pictures at once, not {n}"[:100], "n", "integer_above_max_value"
            )
        return Ask(
            prompt=read_prompt(body.prompt, limits),
            n=n,
            seed=new_seed() if body.seed is None else body.seed,
            maker=read_model(body.model, card),
            size=read_size(body.size, card),
            output_format=body.output_format or "png",
            previews=bool(body.stream) and body.partial_images != 0,
        )

    def _about(self, ask: Ask, made: Made) -> dict[str, Any]:
        card = self.backend.card()
        assert ask.size is not None
        return {
            "output_format": ask.output_format, "size": size_text(ask.size), "seed": ask.seed,
            "model": card.name if ask.maker == "student" else f"{card.name}-teacher",
            "timings": milliseconds(made), "batches": dict(made.batches), "revision": made.revision,
        }  # fmt: skip

    def _keep(self, made: Made, ask: Ask, request: Request) -> list[dict[str, str]]:
        names = [f"{secrets.token_urlsafe(24)}.{ask.output_format}" for _ in made.pictures]
        files = {f"files/{name}": picture for name, picture in zip(names, made.pictures, strict=True)}
        if not self.store.put(files, MEDIA_TYPES[ask.output_format]):
            raise ApiError(400, "response_format: they are larger than all that is kept here; ask for b64_json",
                           "response_format", "too_large")  # fmt: skip
        return [{"url": f"{_origin(request)}/v1/files/{name}"} for name in names]

    async def _events(self, ask: Ask, body: ImageBody) -> AsyncGenerator[tuple[str, bytes], None]:
        """Say the last ``partial_images`` of the steps (all, if it is absent), and the pictures."""
        assert ask.size is not None
        if body.partial_images == 0:
            made = await self.backend.make(ask)
        else:
            shown = 0
            async with aclosing(self.backend.watch(ask)) as seen:
                async for event in seen:
                    if isinstance(event, Made):
                        made = event
                        break
                    if body.partial_images is None or event.number > event.of - body.partial_images:
                        yield PARTIAL, _partial(event, shown, size_text(ask.size))
                        shown += 1
        self.metrics.made(ask.maker, made)
        about = {
            "type": COMPLETED, "created_at": int(time.time()), "background": "opaque", "quality": "auto",
            **self._about(ask, made),
        }  # fmt: skip
        yield COMPLETED, _with_pictures(about, made.pictures)


def _partial(step: Step, index: int, size: str) -> bytes:
    about = {
        "type": PARTIAL, "partial_image_index": index, "created_at": int(time.time()), "size": size,
        "output_format": "png", "background": "opaque", "quality": "auto", "step": step.number, "steps": step.of,
        "made_by": step.made_by, "t": step.t, "t_next": step.t_next, "seconds": step.seconds,
    }  # fmt: skip
    return _with_pictures(about, step.pictures)


def _with_pictures(about: dict[str, Any], pictures: tuple[bytes, ...]) -> bytes:
    each = [base64(picture) for picture in pictures]
    return json_with(about, b64_json=each[0] if each else b'""', pictures=array(each))


def _origin(request: Request) -> str:
    """Return the address by which the client reached this server; a Host header that is none is not repeated."""
    host = request.headers.get("host", "")
    if not HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("localhost", None)
        host = f"[{name}]" if ":" in name else name
        host += f":{port}" if port else ""
    return f"{request.scope['scheme']}://{host}{request.scope.get('root_path', '')}"
