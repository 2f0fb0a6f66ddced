"""Videos on their way: jobs in this process, worked on one after another or together as the backend lets them in."""

import asyncio
import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raydmd.serving.contract import Backend, GenerationRequest, GenerationResult, Overloaded
from raydmd.serving.http.errors import ApiError, as_api_error, retry_after
from raydmd.serving.http.files import MEDIA_TYPES
from raydmd.serving.http.metrics import Metrics
from raydmd.serving.http.reading import within
from raydmd.serving.http.store import Store
from raydmd.serving.settings import Serving

PATIENCE = 5.0  # seconds, after which a job that the backend had no room for asks again, at the latest
FULL = 10.0  # seconds, after which to ask again while all jobs are on their way


@dataclass(eq=False)
class Job:
    """A video that somebody asked for."""

    owner: str
    request: GenerationRequest
    about: dict[str, str]  # model, size and seconds, as the API says them
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(16)}")
    created: float = field(default_factory=time.time)
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    ended: float | None = None
    error: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    @property
    def file(self) -> str:
        """Its name in the store."""
        return f"videos/{self.id}"


class Jobs:
    """The jobs of one API replica. They live in its memory: another replica, or this one restarted, knows none of them.

    Args:
        backend: makes the videos.
        serving: the limits.
        store: where finished videos are kept.
        metrics: where they are counted.
    """

    def __init__(self, backend: Backend, serving: Serving, store: Store, metrics: Metrics) -> None:
        self.backend, self.serving, self.store, self.metrics = backend, serving, store, metrics
        self._jobs: dict[str, Job] = {}

    def start(self, job: Job) -> None:
        """Begin to work on a job; the one of its model that ended first makes room for it.

        Raises:
            ApiError: 429, too many are on their way.
        """
        self._forget()
        most = self.serving.limits.jobs
        alike = [other for other in self._jobs.values() if other.request.maker == job.request.maker]
        if len(alike) >= most:
            over = {other.ended: other for other in alike if other.ended is not None}
            if not over:
                raise ApiError(429, f"{most} videos are on their way already; delete some, or wait",
                               code="too_many_jobs", headers=retry_after(FULL))  # fmt: skip
            self.delete(over[min(over)])
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job))

    def all(self, owner: str) -> list[Job]:
        """Return somebody's jobs, the oldest first."""
        self._forget()
        return [job for job in self._jobs.values() if job.owner == owner]

    def get(self, job: str, owner: str) -> Job:
        """Return somebody's job.

        Raises:
            ApiError: 404, there is none of this id.
        """
        self._forget()
        found = self._jobs.get(job)
        if found is None or found.owner != owner:
            raise ApiError(404, f"no video '{job[:100]}' here", code="video_not_found")
        return found

    def delete(self, job: Job) -> None:
        """Forget a job and its video; one that is on its way is left undone."""
        self._jobs.pop(job.id, None)
        self.store.remove(job.file)
        if job.task is not None:
            job.task.cancel()

    def close(self) -> None:
        """Leave everything undone."""
        for job in list(self._jobs.values()):
            self.delete(job)

    def _forget(self) -> None:
        """Forget jobs that ended long ago."""
        since = time.time() - self.serving.limits.stored_seconds
        for job in [job for job in self._jobs.values() if job.ended is not None and job.ended <= since]:
            self.delete(job)

    async def _run(self, job: Job) -> None:
        try:
            result = await self._make(job)
            if not self.store.put({job.file: result.pictures[0]}, MEDIA_TYPES["mp4"]):
                raise ApiError(400, "the video is larger than all that is kept here", code="too_large")
        except Exception as error:
            job.status, job.error = "failed", as_api_error(error, job.id).body()["error"]
        else:
            job.status, job.progress = "completed", 100
        job.ended, job.request = time.time(), replace(job.request, first_frame=None)

    async def _make(self, job: Job) -> GenerationResult:
        while True:
            try:
                async with within(self.serving.timeout_seconds):
                    # A backend's `watch` is an asynchronous generator, which the contract's type does not say.
                    async with aclosing(self.backend.watch(job.request)) as seen:
                        async for event in seen:
                            if isinstance(event, GenerationResult):
                                self.metrics.record(job.request.maker, event)
                                job.facts = {"timings": {k: round(1000 * v, 3) for k, v in event.seconds.items()},
                                            "batches": dict(event.batches), "revision": event.revision}  # fmt: skip
                                return event
                            job.status = "in_progress"
                            job.progress = min(99, 100 * event.number // event.of)
                raise ApiError(500, "the video was not made")
            except Overloaded as overloaded:  # a job has time, unlike a request
                await asyncio.sleep(min(overloaded.retry_after, PATIENCE))
