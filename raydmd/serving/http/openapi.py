"""``/openapi.json``: what can be asked for here and now, model, sizes and limits included."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from raydmd import __version__
from raydmd.serving.contract import Backend, Card
from raydmd.serving.http import answers
from raydmd.serving.http.first_frame import FIELD, KINDS
from raydmd.serving.http.schemas import ImageBody, VideoBody, VideoList, length_text, size_text
from raydmd.serving.settings import Limits, Serving

Tree = dict[str, Any]
MOST_DESCRIBED_SEED = 2**63 - 1024  # the largest below 2^63 that is a float: readers of JSON have floats
COMMON = (401, 405, 408, 500, 503)  # what any route may answer
WHY = {
    400: "Something is wrong with a field; `param` names it.",
    401: "No API key, or a wrong one.",
    403: "A form sent by a page of another site.",
    404: "There is no such model, video or file.",
    405: "Another method is meant.",
    408: "It was not done in time.",
    413: "The body, or the first frame in it, is too large.",
    415: "The body is not JSON, or does not say so.",
    416: "The range begins behind the file's end.",
    429: "Too many requests wait already; `Retry-After` says when to ask again.",
    500: "An error of the server's own.",
    503: "No replica answers now; `Retry-After` says when to ask again.",
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
DESCRIPTION = """Pictures and videos from few-step students (and their many-step teacher), in OpenAI's form.

Errors are OpenAI's error object, always. A seed makes the same picture again, alone or in any batch. `raydmd` in a
model says what it can do: sizes, prompts, steps and limits."""


class KnownRoute(Route):
    """A route of Starlette's that the scope names; FastAPI's router names only its own."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Say whether a request is for it."""
        match, child = super().matches(scope)
        return match, child if match == Match.NONE else {**child, "route": self}


@dataclass(frozen=True)
class Operation:
    """A route, and what is said of it.

    Attributes:
        method: of HTTP.
        path: as routers write it.
        endpoint: takes a request and returns its answer.
        name: the operation's id.
        summary: a line.
        answer: of 200, as JSON.
        content: of 200, of other media types.
        errors: statuses beyond `COMMON`.
        more: of the operation, by OpenAPI's names: ``parameters``, ``requestBody``.
        open: needs no key.
        shown: in the description.
    """

    method: str
    path: str
    endpoint: Callable[..., Any]
    name: str = ""
    summary: str = ""
    answer: type[BaseModel] | None = None
    content: Tree = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    more: Callable[[Card], Tree] = field(default=lambda card: {})
    open: bool = False
    shown: bool = True

    def route(self) -> Route:
        """Return what serves it: Starlette's route, since requests are read and refused in our own way."""
        return KnownRoute(self.path, self.endpoint, methods=[self.method])

    def described(self, card: Card) -> APIRoute:
        """Return what FastAPI describes."""
        responses: dict[int | str, Tree] = {200: {"description": "What was asked for."}}
        if self.content:
            responses[200]["content"] = self.content
        if self.answer is not None:
            responses[200]["model"] = self.answer
        for status in sorted({*COMMON, *self.errors}):
            responses[status] = {"model": answers.ErrorAnswer, "description": WHY[status]}
        more = {"description": "", **self.more(card), **({"security": []} if self.open else {})}
        tag = self.path.split("/")[2] if self.path.startswith("/v1/") else "server"
        return APIRoute(
            self.path.replace(":path", ""), self.endpoint, methods=[self.method], operation_id=self.name,
            summary=self.summary, responses=responses, openapi_extra=more, response_model=None, tags=[tag],
            response_class=Response,
        )  # fmt: skip


class Description:
    """The description of an API, made anew when other weights are served.

    Args:
        backend: says what is served.
        serving: the limits.
        operations: all of them.
        locked: whether keys are asked for.
    """

    def __init__(
        self, backend: Backend, serving: Serving, operations: list[Operation], locked: Callable[[], bool]
    ) -> None:
        self.backend, self.serving, self.operations, self.locked = backend, serving, operations, locked
        self._made: tuple[tuple[Card, bool], Tree] | None = None

    def document(self) -> Tree:
        """Return the OpenAPI document; to be left as it is."""
        state = self.backend.card(), self.locked()
        if self._made is None or self._made[0] != state:
            self._made = state, self._document(*state)
        return self._made[1]

    def _document(self, card: Card, locked: bool) -> Tree:
        shown = [operation.described(card) for operation in self.operations if operation.shown]
        tree = get_openapi(title=f"raydmd: {card.name}", version=__version__, description=DESCRIPTION, routes=shown)
        if locked:
            schemes = tree.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            tree["security"] = [{"key": []}]
        return tree


def path_parameter(name: str, description: str) -> Tree:
    """Return a required parameter of a path."""
    return {"name": name, "in": "path", "required": True, "description": description,
            "schema": {"type": "string", "minLength": 1}}  # fmt: skip


RANGE = {"name": "range", "in": "header", "required": False, "description": "bytes=FIRST-LAST: a part of the file",
         "schema": {"type": "string"}}  # fmt: skip


def image_request(limits: Limits) -> Callable[[Card], Tree]:
    """Return a maker of what ``POST /v1/images/generations`` takes."""
    return lambda card: {"requestBody": {"required": True, "content": json_content(image_schema(card, limits))}}


def image_events() -> Tree:
    """Return what it streams."""
    events = "with stream: events image_generation.partial_image, image_generation.completed (one a picture) and, for "
    events += "step_previews, image_generation.step; their data are JSON"
    return {"text/event-stream": {"schema": {"type": "string", "description": events}}}


def video_request(limits: Limits) -> Callable[[Card], Tree]:
    """Return a maker of what ``POST /v1/videos`` takes: JSON, or a form of the same fields."""

    def request(card: Card) -> Tree:
        schema = video_schema(card, limits)
        form = form_schema(schema)
        if card.first_frame != "none":
            form["properties"][FIELD] = {"type": "string", "format": "binary", "description": first_frame_words(limits)}
        content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
        note = "" if card.kind == "video" else f"'{card.name}' makes pictures: any request is answered with 400 here."
        return {"requestBody": {"required": True, "content": content}, "description": note}

    return request


def list_query(card: Card) -> Tree:
    """Return what ``GET /v1/videos`` takes."""
    properties = VideoList.model_json_schema()["properties"]
    return {"parameters": [{"name": name, "in": "query", "required": False, "schema": schema}
                           for name, schema in properties.items()]}  # fmt: skip


def json_content(schema: Tree) -> Tree:
    """Return a body of JSON."""
    return {"application/json": {"schema": schema}}


def image_schema(card: Card, limits: Limits) -> Tree:
    """Return the fields of a request for pictures, with what this model takes."""
    tree = _with_model(ImageBody.model_json_schema(), card, limits)
    one = _prompt(card, limits)
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": limits.n}
    tree["properties"]["prompt"] |= {"anyOf": [one, several]}
    _narrow(tree, "n", maximum=limits.n)
    return tree


def video_schema(card: Card, limits: Limits) -> Tree:
    """Return the fields of a request for a video."""
    tree = _with_model(VideoBody.model_json_schema(), card, limits)
    tree["properties"]["prompt"] = _prompt(card, limits)
    tree["properties"]["seconds"]["description"] = f"this model makes videos of {length_text(card)} s"
    if card.first_frame == "none":
        del tree["properties"][FIELD]
        return tree
    url = {"type": "string", "description": "a data URL (data:image/png;base64,...), or the file in Base64"}
    openais = {"type": "object", "properties": {"image_url": url}, "required": ["image_url"],
               "additionalProperties": False}  # fmt: skip
    needed = card.first_frame == "required"
    kinds = [url, openais, *([] if needed else [{"type": "null"}])]
    tree["properties"][FIELD] = {"anyOf": kinds, "description": first_frame_words(limits)}
    if needed:
        tree["required"] = [*tree["required"], FIELD]
    return tree


def first_frame_words(limits: Limits) -> str:
    """Say what is taken as a first frame."""
    return (f"the first frame: {KINDS} of at most {limits.image_bytes} bytes and {limits.image_pixels} pixels, resized "
            f"and cut around its centre to the video's size")  # fmt: skip


def form_schema(schema: Tree) -> Tree:
    """Return a schema's fields as a form's, whose values are text and never null."""
    fields = {name: next((kind for kind in each.get("anyOf", []) if kind.get("type") != "null"), each)
              for name, each in schema["properties"].items()}  # fmt: skip
    return {**schema, "properties": fields}


def _prompt(card: Card, limits: Limits) -> Tree:
    if card.prompts is not None:
        return {"type": "string", "enum": list(card.prompts)}
    return {"type": "string", "minLength": 1, "maxLength": limits.prompt_characters, "pattern": r"\S"}


def _with_model(tree: Tree, card: Card, limits: Limits) -> Tree:
    ids = [*card.names(), *(card.names("teacher") if card.teacher_steps is not None else ())]
    _narrow(tree, "model", enum=ids)
    _narrow(tree, "size", enum=["auto", *(size_text(size) for size in card.sizes)])
    _narrow(tree, "seed", maximum=MOST_DESCRIBED_SEED)
    _narrow(tree, "num_inference_steps", maximum=limits.teacher_steps)
    _narrow(tree, "negative_prompt", maxLength=limits.prompt_characters)
    return tree


def _narrow(tree: Tree, name: str, **more: Any) -> None:
    """Add to what a field that may be null takes otherwise."""
    for kind in tree["properties"][name]["anyOf"]:
        if kind.get("type") != "null":
            kind.update(more)
