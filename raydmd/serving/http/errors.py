"""What a client is told when a request fails: OpenAI's error object, and the status that fits."""

import json
import logging
import math
import traceback
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from raydmd.errors import PortableError, nearest
from raydmd.serving.contract import BadRequest, NotFinite, Overloaded, Unavailable

log = logging.getLogger("raydmd.serving.http")

LONGEST = 500  # characters of a message: it may quote the request
RETRY_AFTER = 2.0  # seconds, of replicas that start
FULL = "x-raydmd-full"  # of whose requests all would be refused: the proxy in front may do so by itself,
FULL_MS = f"{FULL}-ms"  # for as many milliseconds

M = TypeVar("M", bound=BaseModel)


class ApiError(PortableError):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one sentence for the client.
        param: the field to blame.
        code: for programs, as ``model_not_found``.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}
        self.message = message if len(message) <= LONGEST else message[: LONGEST - 3] + "..."

    @property
    def type(self) -> str:
        """OpenAI's name of the kind of error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        error = {"type": self.type, "message": self.message, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(PortableError):
    """The client left before its answer was made; nobody is told anything."""


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """Return what a client is told of an error; one that is our own mistake is logged, and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadRequest):
        return ApiError(400, str(error), error.param, "invalid_value")
    if isinstance(error, Overloaded):
        headers = retry_after(error.retry_after)
        if hold := int(1000 * error.full_seconds):
            headers |= {FULL: error.maker, FULL_MS: str(hold)}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers=retry_after(RETRY_AFTER))
    if isinstance(error, NotFinite):
        log.error("%s", json.dumps({"event": "error", "request_id": request_id, "error": str(error)}))
        return ApiError(500, str(error), code="not_finite")
    lines = traceback.format_exception(error)
    log.error("%s", json.dumps({"event": "error", "request_id": request_id, "traceback": "".join(lines)}))
    return ApiError(500, f"an error of the server's own; its log has more under request {request_id}", code="internal")


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that says when to ask again."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def from_http(error: HTTPException, path: str, routes: list[str], methods: set[str]) -> ApiError:
    """Return the router's own errors (404, 405, a form that cannot be read) as ours.

    Args:
        error: the router's.
        path: that was asked for.
        routes: that there are.
        methods: that there are for the path.
    """
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError(404, f"no route '{path[:200]}'{nearest(path[:200], routes)}", code="unknown_url")
    if error.status_code == 405:
        allowed = ", ".join(sorted(methods))
        return ApiError(405, f"this method is not for '{path[:200]}' (only: {allowed})", code="method",
                        headers={"allow": allowed})  # fmt: skip
    return ApiError(error.status_code, str(error.detail), headers=headers)


def parsed(model: type[M], values: bytes | dict[str, Any], strict: bool | None = None) -> M:
    """Validate a request's JSON, or values from a form or a query (not ``strict``: numbers may be text).

    Raises:
        ApiError: 400 that names the first wrong field, and the nearest right one if there is none of that name.
    """
    try:
        if isinstance(values, bytes):
            return model.model_validate_json(values)
        return model.model_validate(values, strict=strict)
    except ValidationError as error:
        raise _explained(error, model) from None


def _explained(error: ValidationError, model: type[BaseModel]) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="json")
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object", code="invalid_type")
    field = str(first["loc"][0])[:100]
    reason = getattr(model, "reasons", {}).get(field)
    if first["type"] == "extra_forbidden":
        hint = f" ({reason})" if reason else nearest(field, model.model_fields)
        return ApiError(400, f"unknown field '{field}'{hint}", field, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"'{field}' is required", field, "missing_required_parameter")
    if first["type"] == "none_required":
        return ApiError(400, f"{field}: it cannot be obeyed{f' ({reason})' if reason else ''}; leave it out", field,
                        "unsupported_parameter")  # fmt: skip
    return ApiError(400, f"{field}: {first['msg']}{f' ({reason})' if reason else ''}", field, "invalid_value")
