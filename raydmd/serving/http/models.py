"""``/v1/models`` and ``/health``: what is served, and whether it is."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from raydmd.serving.contract import Backend, Maker, Unavailable
from raydmd.serving.http.errors import ApiError
from raydmd.serving.http.reading import within
from raydmd.serving.http.schemas import read_model, size_text
from raydmd.serving.settings import Limits

HEALTH_SECONDS = 2.0


class Models:
    """The routes of what is served.

    Args:
        backend: serves it.
        limits: of a request.
    """

    def __init__(self, backend: Backend, limits: Limits) -> None:
        self.backend, self.limits = backend, limits

    async def all(self, request: Request) -> Response:
        """``GET /v1/models``."""
        card = self.backend.card()
        makers: list[Maker] = ["student"] if card.teacher_steps is None else ["student", "teacher"]
        models = [self._model(name, maker) for maker in makers for name in card.names(maker)]
        return JSONResponse({"object": "list", "data": models})

    async def one(self, request: Request) -> Response:
        """``GET /v1/models/ID``."""
        name: str = request.path_params["model"]
        return JSONResponse(self._model(name, read_model(name, self.backend.card())))

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 if a request could be served now, else 503."""
        try:
            async with within(HEALTH_SECONDS):
                await self.backend.ready()
        except ApiError:
            raise Unavailable("the replicas do not answer") from None
        card = self.backend.card()
        state = {"model": card.name, "revision": card.revision, "export": card.export}
        return JSONResponse({"status": "ok", **state, "queued": self.backend.queued()})

    def _model(self, name: str, maker: Maker) -> dict[str, Any]:
        card, limits = self.backend.card(), self.limits
        steps = [{"made_by": step.made_by, "t": step.t, "t_next": step.t_next} for step in card.steps]
        own, teacher = card.names(maker)[0], card.names("teacher")[0]
        return {
            "id": name,
            "object": "model",
            "created": card.created,
            "owned_by": "raydmd",
            "raydmd": {
                "kind": card.kind, "family": card.family, "sizes": [size_text(size) for size in card.sizes],
                "prompts": list(card.prompts) if card.prompts is not None else None, "steps": steps,
                "teacher": None if card.teacher_steps is None else {"id": teacher, "steps": card.teacher_steps},
                "alias_of": None if name == own else own,
                "guidance_scale": card.guidance_scale, "negative_prompts": card.negative_prompts,
                "frames": card.frames, "fps": card.fps, "first_frame": card.first_frame, "layout": card.layout,
                "revision": card.revision, "export": card.export,
                "limits": {
                    "n": limits.n, "prompt_characters": limits.prompt_characters,
                    "num_inference_steps": limits.teacher_steps, "image_bytes": limits.image_bytes,
                    "image_pixels": limits.image_pixels,
                },
            },
        }  # fmt: skip
