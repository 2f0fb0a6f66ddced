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

from raydmd.serving.contract import Ask, Backend, Made, Maker, partial_steps
from raydmd.serving.http.errors import ApiError, parsed
from raydmd.serving.http.files import MEDIA_TYPES, file_response
from raydmd.serving.http.image_events import (
    COMPLETED,
    PARTIAL,
    STEP,
    completed_event,
    milliseconds,
    of_prompt,
    partial_event,
    step_event,
    usage,
)
from raydmd.serving.http.metrics import Metrics
from raydmd.serving.http.raw_json import array, base64, json_with
from raydmd.serving.http.reading import must_be_json, read_body, while_there, within
from raydmd.serving.http.schemas import (
    ImageBody,
    read_model,
    read_prompts,
    read_sampling,
    read_seed,
    read_size,
    size_text,
)
from raydmd.serving.http.sse import EventStream
from raydmd.serving.http.store import Store
from raydmd.serving.settings import Serving

HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?", re.ASCII)


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
        self._check_together(body, ask)
        if body.stream:
            return EventStream(self._events(ask, body), self.serving.timeout_seconds)
        async with within(self.serving.timeout_seconds):
            made = await while_there(request.receive, self.backend.make(ask))
        if body.response_format == "url":
            each = [b'"url": %s' % json.dumps(url).encode() for url in self._keep(made, ask, request)]
        else:
            each = [b'"b64_json": %s' % base64(picture) for picture in made.pictures]
        data = array(b"{%s%s}" % (picture, of_prompt(ask, i)) for i, picture in enumerate(each))
        about = {"created": int(time.time()), "background": "opaque", **self._about(ask, made, body)}
        answer = json_with({**about, "usage": usage(made)}, data=data)
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
        maker, n = read_model(body.model, card), body.n or 1
        return Ask(
            prompt=read_prompts(body.prompt, n, limits),
            n=n,
            seed=read_seed(body.seed),
            maker=maker,
            size=read_size(body.size, card),
            output_format=body.output_format or "png",
            compression=body.output_compression,
            previews=bool(body.stream and body.step_previews),
            partial_images=body.partial_images or 0,
            **read_sampling(body, maker, card, limits),
        )

    def _check_together(self, body: ImageBody, ask: Ask) -> None:
        """Refuse fields that do not go together.

        Raises:
            ApiError: 400.
        """
        if ask.output_format == "png" and body.output_compression not in (None, 100):
            raise ApiError(400, "output_compression: PNG files lose nothing (100 alone); it is for output_format jpeg "
                           "and webp", "output_compression", "invalid_value")  # fmt: skip
        for field in ("partial_images", "step_previews"):
            if getattr(body, field) and not body.stream:
                raise ApiError(400, f"{field}: in a stream alone (stream: true)", field, "invalid_value")
        if body.response_format == "url" and self.serving.api_replicas > 1:
            raise ApiError(400, "response_format: this server has several API replicas, and a URL is known to one of "
                           "them: ask for b64_json", "response_format", "invalid_value")  # fmt: skip
        if body.response_format == "url" and body.stream:
            raise ApiError(400, "response_format: a stream carries pictures as b64_json alone", "response_format",
                           "invalid_value")  # fmt: skip

    def _about(self, ask: Ask, made: Made, body: ImageBody) -> dict[str, Any]:
        card = self.backend.card()
        assert ask.size is not None
        about = {
            "output_format": ask.output_format, "size": size_text(ask.size), "seed": ask.seed,
            "model": card.names(ask.maker)[0], "timings": milliseconds(made), "batches": dict(made.batches),
            "revision": made.revision,
        }  # fmt: skip
        if ask.maker == "teacher":
            about["num_inference_steps"] = ask.steps or card.teacher_steps
            about["guidance_scale"] = card.guidance_scale if ask.guidance_scale is None else ask.guidance_scale
        if user := body.safety_identifier or body.user:
            about["safety_identifier"] = user
        return about

    def _keep(self, made: Made, ask: Ask, request: Request) -> list[str]:
        names = [f"{secrets.token_urlsafe(24)}.{ask.output_format}" for _ in made.pictures]
        files = {f"files/{name}": picture for name, picture in zip(names, made.pictures, strict=True)}
        if not self.store.put(files, MEDIA_TYPES[ask.output_format]):
            raise ApiError(400, "response_format: they are larger than all that is kept here; ask for b64_json",
                           "response_format", "too_large")  # fmt: skip
        return [f"{_origin(request)}/v1/files/{name}" for name in names]

    async def _events(self, ask: Ask, body: ImageBody) -> AsyncGenerator[tuple[str, bytes], None]:
        """Say the steps that are wanted, and each picture."""
        if not (ask.previews or ask.partial_images):
            made = await self.backend.make(ask)
        else:
            partial = 0
            async with aclosing(self.backend.watch(ask)) as seen:
                async for event in seen:
                    if isinstance(event, Made):
                        made = event
                        break
                    if ask.previews:
                        yield STEP, step_event(ask, event)
                    if event.number in partial_steps(ask.partial_images, event.of):
                        for i in range(len(event.pictures)):
                            yield PARTIAL, partial_event(ask, event, i, partial)
                        partial += 1
        self.metrics.made(ask.maker, made)
        about = self._about(ask, made, body)
        for i in range(len(made.pictures)):
            yield COMPLETED, completed_event(ask, made, i, about)


def _origin(request: Request) -> str:
    """Return the address by which the client reached this server; a Host header that is none is not repeated."""
    host = request.headers.get("host", "")
    if not HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("localhost", None)
        host = f"[{name}]" if ":" in name else name
        host += f":{port}" if port else ""
    return f"{request.scope['scheme']}://{host}{request.scope.get('root_path', '')}"
