"""What requests look like: OpenAI's fields, and ``seed``."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydmd.errors import nearest
from raydmd.serving.contract import Card, Maker, Size
from raydmd.serving.http.errors import ApiError
from raydmd.serving.settings import Limits

MOST_SEED = 2**63 - 1
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageBody(_Body):
    """``POST /v1/images/generations``; null is as absent."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    seed: Seed | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0)] | None = None
    # OpenAI's, without a meaning here
    user: Any = None
    safety_identifier: Any = None
    quality: Any = None
    style: Any = None
    background: Any = None
    moderation: Any = None
    output_compression: Any = None
    input_fidelity: Any = None


class VideoBody(_Body):
    """``POST /v1/videos``; null is as absent."""

    prompt: str
    model: str | None = None
    size: str | None = None
    seconds: str | int | float | None = None
    seed: Seed | None = None
    user: Any = None


class VideoList(_Body):
    """The query of ``GET /v1/videos``."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


def read_prompt(prompt: str, limits: Limits) -> str:
    """Return a prompt that may be asked for.

    Raises:
        ApiError: 400, it is empty or too long.
    """
    if not prompt.strip():
        raise ApiError(400, "prompt: it is empty", "prompt", "invalid_value")
    if len(prompt) > limits.prompt_characters:
        raise ApiError(400, f"prompt: at most {limits.prompt_characters} characters, not {len(prompt)}", "prompt",
                       "string_above_max_length")  # fmt: skip
    return prompt


def read_model(name: str | None, card: Card) -> Maker:
    """Return who is meant by a model's id.

    Raises:
        ApiError: 404, nobody is.
    """
    teacher = f"{card.name}-teacher"
    if name is None or name == card.name:
        return "student"
    if name == teacher and card.teacher_steps is not None:
        return "teacher"
    if name == teacher:
        message = "the teacher is not served here (start the server with --teacher)"
    else:
        known = [card.name, teacher] if card.teacher_steps is not None else [card.name]
        message = f"no model '{name[:200]}'{nearest(name[:200], known)}"
    raise ApiError(404, message, "model", "model_not_found")


def read_size(size: str | None, card: Card) -> Size:
    """Return the size that is meant, the model's own for ``auto``.

    Raises:
        ApiError: 400, it is none, or none that is served.
    """
    if size is None or size == "auto":
        return card.sizes[0]
    allowed = [size_text(each) for each in card.sizes]
    match = SIZE.fullmatch(size)
    if match is None:
        raise ApiError(400, f"size: 'auto' or WIDTHxHEIGHT, as {allowed[0]}, not '{size[:50]}'", "size",
                       "invalid_value")  # fmt: skip
    found = (int(match[1]), int(match[2]))
    if found not in card.sizes:
        raise ApiError(400, f"size: '{size}' is not served here (one of: {', '.join(allowed)})", "size",
                       "invalid_value")  # fmt: skip
    return found


def size_text(size: Size) -> str:
    """Return a size as the API writes it: ``WIDTHxHEIGHT``."""
    return f"{size[0]}x{size[1]}"


def check_seconds(seconds: str | int | float | None, card: Card) -> None:
    """Let a video's length pass that is the model's own, up to half a second.

    Raises:
        ApiError: 400, it is another: a model makes videos of one length.
    """
    if seconds is None:
        return
    try:
        off = abs(float(seconds) - card.frames / card.fps)
    except (ValueError, OverflowError):
        off = float("inf")
    if not off <= 0.5:  # a NaN is refused, too
        raise ApiError(400, f"seconds: this model makes videos of {length_text(card)} s", "seconds", "invalid_value")


def length_text(card: Card) -> str:
    """Return the length of the model's videos in seconds, as the API writes it: a string."""
    return f"{card.frames / card.fps:.2f}".rstrip("0").rstrip(".")
