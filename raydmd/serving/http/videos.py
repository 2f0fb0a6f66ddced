"""``/v1/videos``: jobs that make videos, as OpenAI's. They live in one API replica's memory: see `jobs.Jobs`."""

import asyncio
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from raydmd.serving.contract import Backend, GenerationRequest, Size, no_first_frame
from raydmd.serving.http.cors import may_send_forms
from raydmd.serving.http.errors import ApiError, parsed
from raydmd.serving.http.files import file_response
from raydmd.serving.http.first_frame import FIELD, first_frame_bytes, first_frame_pixels
from raydmd.serving.http.jobs import Job, Jobs
from raydmd.serving.http.reading import media_type, must_be_json, read_body, read_form, within
from raydmd.serving.http.schemas import (
    VideoBody,
    VideoList,
    check_seconds,
    length_text,
    read_model,
    read_prompt,
    read_sampling,
    read_seed,
    read_size,
    size_text,
)
from raydmd.serving.settings import Serving

FORM = "multipart/form-data"


class Videos:
    """The routes of videos. With API keys, each sees its own videos alone."""

    def __init__(self, backend: Backend, serving: Serving, jobs: Jobs) -> None:
        self.backend, self.serving, self.jobs = backend, serving, jobs
        self._decoding = asyncio.Lock()  # one picture at a time: each takes its pixels' memory

    async def create(self, http_request: Request) -> Response:
        """``POST /v1/videos``: begin a video; JSON, or the form that OpenAI's client sends."""
        must_be_json(http_request, also=(FORM,))
        async with within(self.serving.timeout_seconds):
            raw = await read_body(http_request, self._most_bytes())
            file = None
            if media_type(http_request) == FORM:
                if not may_send_forms(http_request, self.serving.cors_origins):
                    raise ApiError(403, "forms from pages of other sites are not taken", code="cross_site")
                fields, file = await read_form(http_request, raw, FIELD)
                body = parsed(VideoBody, fields, strict=False)
            else:
                body = parsed(VideoBody, raw)
            job = self._job(body, http_request.scope["raydmd.owner"])
            frame = await self._first_frame(body, file, job.request.size)
            job.request = replace(job.request, first_frame=frame)
            await self.backend.check(job.request)
        self.jobs.start(job)
        return JSONResponse(self._said(job))

    async def all(self, http_request: Request) -> Response:
        """``GET /v1/videos``: a list, the newest first."""
        query = parsed(VideoList, dict(http_request.query_params), strict=False)
        jobs = self.jobs.all(http_request.scope["raydmd.owner"])
        if query.order == "desc":
            jobs.reverse()
        if query.after is not None:
            ids = [job.id for job in jobs]
            if query.after not in ids:
                raise ApiError(400, f"after: no video '{query.after[:100]}' here", "after", "invalid_value")
            jobs = jobs[ids.index(query.after) + 1 :]
        shown = [self._said(job) for job in jobs[: query.limit]]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        return JSONResponse({"object": "list", "data": shown, "has_more": len(jobs) > query.limit, **ends})

    async def one(self, http_request: Request) -> Response:
        """``GET /v1/videos/ID``."""
        return JSONResponse(self._said(self._asked(http_request)))

    async def content(self, http_request: Request) -> Response:
        """``GET /v1/videos/ID/content``: the MP4 file, or a range of it."""
        if (variant := http_request.query_params.get("variant", "video")) != "video":
            raise ApiError(400, f"variant: there is 'video' alone, not '{variant[:50]}'", "variant", "invalid_value")
        job = self._asked(http_request)
        if job.status != "completed":
            why = f"it failed: {job.error['message']}" if job.error else f"it is {job.status} ({job.progress} %)"
            raise ApiError(400, f"there is no video yet: {why}", code="video_not_ready")
        if (kept := self.jobs.store.get(job.file)) is None:
            raise ApiError(404, "the video made room for newer ones; make it again", code="video_expired")
        return file_response(http_request, kept.data, kept.media_type, self.serving.limits.stored_seconds)

    async def delete(self, http_request: Request) -> Response:
        """``DELETE /v1/videos/ID``: forget it; one that is on its way is left undone."""
        job = self._asked(http_request)
        self.jobs.delete(job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    def _asked(self, http_request: Request) -> Job:
        return self.jobs.get(http_request.path_params["video"], http_request.scope["raydmd.owner"])

    def _most_bytes(self) -> int:
        """Return how large a request may be: with a first frame in Base64, where there may be one."""
        limits = self.serving.limits
        return limits.body_bytes + (4 * (limits.image_bytes // 3 + 1) if self.backend.card().kind == "video" else 0)

    async def _first_frame(self, body: VideoBody, file: bytes | None, size: Size | None) -> bytes | None:
        """Return the first frame's pixels, of a file or of what stands in JSON.

        Raises:
            ApiError: 400 or 413, it is no picture, too large, or not taken.
        """
        reference, limits, card = body.input_reference, self.serving.limits, self.backend.card()
        if file is None and reference is None:
            return None
        if card.first_frame == "none":
            raise ApiError(400, no_first_frame(card), FIELD, "unsupported_parameter")
        if file is not None and reference is not None:
            raise ApiError(400, f"{FIELD}: it is there twice", FIELD, "invalid_value")
        assert size is not None
        data = file if reference is None else first_frame_bytes(reference, limits)
        assert data is not None
        async with self._decoding:
            return await asyncio.to_thread(first_frame_pixels, data, size, limits)

    def _job(self, body: VideoBody, owner: str) -> Job:
        card = self.backend.card()
        if card.kind != "video":
            raise ApiError(400, f"'{card.name}' makes {card.kind}s: ask for them at POST /v1/images/generations",
                           "model", "wrong_model_kind")  # fmt: skip
        check_seconds(body.seconds, card)
        maker = read_model(body.model, card)
        request = GenerationRequest(
            prompt=read_prompt(body.prompt, self.serving.limits),
            seed=read_seed(body.seed),
            maker=maker,
            size=read_size(body.size, card),
            output_format="mp4",
            **read_sampling(body, maker, card, self.serving.limits),
        )
        assert request.size is not None
        model = card.names(maker)[0]
        return Job(owner, request, {"model": model, "size": size_text(request.size), "seconds": length_text(card)})

    def _said(self, job: Job) -> dict[str, Any]:
        ended = None if job.ended is None else int(job.ended)
        done = ended if job.status == "completed" else None
        return {
            "id": job.id, "object": "video", "status": job.status, "progress": job.progress, **job.about,
            "prompt": job.request.prompt, "seed": job.request.seed, "created_at": int(job.created),
            "completed_at": done,
            "expires_at": None if done is None else int(done + self.serving.limits.stored_seconds),
            "error": job.error, **job.facts,
        }  # fmt: skip
