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

from raydmd.serving.contract import Backend, GenerationRequest, GenerationResult, Maker, partial_steps
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

    async def generate(self, http_request: Request) -> ASGIApp:
        """``POST /v1/images/generations``: an answer as OpenAI's, or its stream of events."""
        must_be_json(http_request)
        async with within(self.serving.timeout_seconds):
            body = parsed(ImageBody, await read_body(http_request, self.serving.limits.body_bytes))
        request = self._ask(body)
        self._check_together(body, request)
        if body.stream:
            return EventStream(self._events(request, body), self.serving.timeout_seconds)
        async with within(self.serving.timeout_seconds):
            result = await while_there(http_request.receive, self.backend.make(request))
        if body.response_format == "url":
            each = [b'"url": %s' % json.dumps(url).encode() for url in self._keep(result, request, http_request)]
        else:
            each = [b'"b64_json": %s' % base64(picture) for picture in result.pictures]
        data = array(b"{%s%s}" % (picture, of_prompt(request, i)) for i, picture in enumerate(each))
        about = {"created": int(time.time()), "background": "opaque", **self._about(request, result, body)}
        answer = json_with({**about, "usage": usage(result)}, data=data)
        counted = BackgroundTask(self._count, request.maker, result)  # once it is sent: nobody waits for that
        return Response(answer, 200, media_type="application/json", background=counted)

    async def file(self, http_request: Request) -> Response:
        """``GET /v1/files/NAME``: a picture that was answered as a URL."""
        kept = self.store.get(f"files/{http_request.path_params['name']}")
        if kept is None:
            raise ApiError(404, f"no such file; files are kept for {self.serving.limits.stored_seconds:g} s at most",
                           code="file_not_found")  # fmt: skip
        return file_response(http_request, kept.data, kept.media_type, self.store.seconds)

    async def _count(self, maker: Maker, result: GenerationResult) -> None:
        self.metrics.record(maker, result)

    def _ask(self, body: ImageBody) -> GenerationRequest:
        card, limits = self.backend.card(), self.serving.limits
        if card.kind != "image":
            raise ApiError(400, f"'{card.name}' makes {card.kind}s: ask for them at POST /v1/videos", "model",
                           "wrong_model_kind")  # fmt: skip
        maker, n = read_model(body.model, card), body.n or 1
        return GenerationRequest(
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

    def _check_together(self, body: ImageBody, request: GenerationRequest) -> None:
        """Refuse fields that do not go together.

        Raises:
            ApiError: 400.
        """
        if request.output_format == "png" and body.output_compression not in (None, 100):
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

    def _about(self, request: GenerationRequest, result: GenerationResult, body: ImageBody) -> dict[str, Any]:
        card = self.backend.card()
        assert request.size is not None
        about = {
            "output_format": request.output_format, "size": size_text(request.size), "seed": request.seed,
            "model": card.names(request.maker)[0], "timings": milliseconds(result), "batches": dict(result.batches),
            "revision": result.revision,
        }  # fmt: skip
        if request.maker == "teacher":
            about["num_inference_steps"] = request.steps or card.teacher_steps
            about["guidance_scale"] = card.guidance_scale if request.guidance_scale is None else request.guidance_scale
        if user := body.safety_identifier or body.user:
            about["safety_identifier"] = user
        return about

    def _keep(self, result: GenerationResult, request: GenerationRequest, http_request: Request) -> list[str]:
        names = [f"{secrets.token_urlsafe(24)}.{request.output_format}" for _ in result.pictures]
        files = {f"files/{name}": picture for name, picture in zip(names, result.pictures, strict=True)}
        if not self.store.put(files, MEDIA_TYPES[request.output_format]):
            raise ApiError(400, "response_format: they are larger than all that is kept here; ask for b64_json",
                           "response_format", "too_large")  # fmt: skip
        return [f"{_origin(http_request)}/v1/files/{name}" for name in names]

    async def _events(self, request: GenerationRequest, body: ImageBody) -> AsyncGenerator[tuple[str, bytes], None]:
        """Say the steps that are wanted, and each picture."""
        if not (request.previews or request.partial_images):
            result = await self.backend.make(request)
        else:
            partial = 0
            async with aclosing(self.backend.watch(request)) as seen:
                async for event in seen:
                    if isinstance(event, GenerationResult):
                        result = event
                        break
                    if request.previews:
                        yield STEP, step_event(request, event)
                    if event.number in partial_steps(request.partial_images, event.of):
                        for i in range(len(event.pictures)):
                            yield PARTIAL, partial_event(request, event, i, partial)
                        partial += 1
        self.metrics.record(request.maker, result)
        about = self._about(request, result, body)
        for i in range(len(result.pictures)):
            yield COMPLETED, completed_event(request, result, i, about)


def _origin(http_request: Request) -> str:
    """Return the address by which the client reached this server; a Host header that is none is not repeated."""
    host = http_request.headers.get("host", "")
    if not HOST.fullmatch(host):
        name, port = http_request.scope.get("server") or ("localhost", None)
        host = f"[{name}]" if ":" in name else name
        host += f":{port}" if port else ""
    return f"{http_request.scope['scheme']}://{host}{http_request.scope.get('root_path', '')}"
