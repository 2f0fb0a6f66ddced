"""``/v1/models`` and ``/health``: what is served, and whether it is."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from raydmd.serving.contract import Backend, Unavailable
from raydmd.serving.http.errors import ApiError
from raydmd.serving.http.reading import within
from raydmd.serving.http.schemas import read_model, size_text

HEALTH_SECONDS = 2.0


class Models:
    """The routes of what is served."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def all(self, request: Request) -> Response:
        """``GET /v1/models``."""
        models = [self._model(teacher=False)]
        if self.backend.card().teacher_steps is not None:
            models.append(self._model(teacher=True))
        return JSONResponse({"object": "list", "data": models})

    async def one(self, request: Request) -> Response:
        """``GET /v1/models/ID``."""
        maker = read_model(request.path_params["model"], self.backend.card())
        return JSONResponse(self._model(teacher=maker == "teacher"))

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 if a request could be served now, else 503."""
        try:
            async with within(HEALTH_SECONDS):
                await self.backend.ready()
        except ApiError:
            raise Unavailable("the replicas do not answer") from None
        card = self.backend.card()
        state = {"model": card.name, "revision": card.revision, "queued": self.backend.queued()}
        return JSONResponse({"status": "ok", **state})

    def _model(self, teacher: bool) -> dict[str, Any]:
        card = self.backend.card()
        steps = [{"made_by": step.made_by, "t": step.t, "t_next": step.t_next} for step in card.steps]
        return {
            "id": f"{card.name}-teacher" if teacher else card.name,
            "object": "model",
            "created": card.created,
            "owned_by": "raydmd",
            "raydmd": {
                "kind": card.kind, "family": card.family, "sizes": [size_text(size) for size in card.sizes],
                "prompts": list(card.prompts) if card.prompts is not None else None, "steps": steps,
                "teacher": None if card.teacher_steps is None else {
                    "id": f"{card.name}-teacher", "steps": card.teacher_steps,
                },
                "guidance_scale": card.guidance_scale, "frames": card.frames, "fps": card.fps, "layout": card.layout,
                "revision": card.revision,
            },
        }  # fmt: skip
