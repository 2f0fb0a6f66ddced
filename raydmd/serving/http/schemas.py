"""What requests look like: OpenAI's fields, and those that other servers of diffusion models have."""

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from raydmd.errors import nearest
from raydmd.serving.contract import Card, Maker, Size, no_negative_prompt
from raydmd.serving.http.errors import ApiError
from raydmd.serving.settings import Limits

MOST_SEED = 2**63 - 1
SEEDS = 2**53  # drawn ones are below it: numbers that JavaScript can say
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)

Seed = Annotated[int, Field(ge=-1, le=MOST_SEED, description="absent or -1: a random one, told in the answer")]
Steps = Annotated[int, Field(ge=1, description="of the teacher alone: a student's steps are those it was trained for")]
Guidance = Annotated[
    float,
    Field(ge=0, le=100, allow_inf_nan=False, description="of the teacher alone: u + w (c - u); students have none"),
]
Negative = Annotated[str, Field(description="of the teacher alone, where it has a text encoder")]
Named = Annotated[str, Field(max_length=1000)]

ONE_QUALITY = "a model here makes pictures of one quality"
FIRST_FRAME = "a picture is taken as the first frame of a video alone: input_reference at POST /v1/videos"
ONE_SCALE = "one number, that of a teacher's both networks where it has two"
REASONS = {
    "quality": ONE_QUALITY,
    "background": "pictures here have no transparency",
    "moderation": "nothing is filtered here",
    "style": "say it in the prompt",
    "complexity": ONE_QUALITY,
    "svg": "models here make pixels",
    "frame_count": "no GIFs are made here",
    "frame_duration_ms": "no GIFs are made here",
    "input_fidelity": FIRST_FRAME,
    "input_reference": FIRST_FRAME,
    "image": FIRST_FRAME,
    "true_cfg_scale": "guidance_scale is the scale of classifier-free guidance here",
    "guidance_scale_2": ONE_SCALE,
    "guidance_scale": ONE_SCALE,
    "width": "give size, as '1024x1024'",
    "height": "give size, as '1024x1024'",
}


class _Body(BaseModel):
    """A request's fields.

    Attributes:
        reasons: why a field, or its value, is refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    reasons: ClassVar[Mapping[str, str]] = REASONS


class ImageBody(_Body):
    """``POST /v1/images/generations``; null is as absent."""

    prompt: str | list[str] = Field(description="what to make; of several, each is made n times from the same seed")
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    seed: Seed | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[
        int, Field(ge=0, le=100, description="quality of JPEG and WebP (default 95); PNG takes 100 alone")
    ] | None = None  # fmt: skip
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3, description="unfinished pictures in a stream")] | None = None
    step_previews: Annotated[bool, Field(description="in a stream, every step as an event")] | None = None
    negative_prompt: Negative | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Named | None = None
    safety_identifier: Named | None = None
    # OpenAI's, without a meaning here: nothing but null is taken
    style: None = None
    complexity: None = None
    svg: None = None
    frame_count: None = None
    frame_duration_ms: None = None
    input_fidelity: None = None


class VideoBody(_Body):
    """``POST /v1/videos``; null is as absent."""

    reasons: ClassVar[Mapping[str, str]] = {
        **REASONS, "input_reference": "the file in a form, or a data URL, by itself or as image_url of an object"
    }  # fmt: skip
    prompt: str
    model: str | None = None
    size: str | None = None
    seconds: str | int | float | None = None
    input_reference: str | dict[str, str] | None = None
    seed: Seed | None = None
    negative_prompt: Negative | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    user: Named | None = None


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


def read_prompts(prompt: str | list[str], n: int, limits: Limits) -> str | tuple[str, ...]:
    """Return prompts that may be asked for, ``n`` pictures of each.

    Raises:
        ApiError: 400, one is empty or too long, there is none, or they are too many together.
    """
    if n > limits.n:
        raise ApiError(400, f"n: at most {limits.n} pictures at once, not {n}"[:100], "n", "integer_above_max_value")
    if isinstance(prompt, str):
        return read_prompt(prompt, limits)
    if not prompt:
        raise ApiError(400, "prompt: the list is empty", "prompt", "invalid_value")
    if n * len(prompt) > limits.n:
        raise ApiError(400, f"prompt: at most {limits.n} pictures at once, not {len(prompt)} prompts of {n}", "prompt",
                       "array_above_max_length")  # fmt: skip
    return tuple(read_prompt(each, limits) for each in prompt)


def read_seed(seed: int | None) -> int:
    """Return a seed: a random one for who gave none, or -1."""
    return secrets.randbelow(SEEDS) if seed is None or seed < 0 else seed


def read_model(name: str | None, card: Card) -> Maker:
    """Return who is meant by a model's id.

    Raises:
        ApiError: 404, nobody is.
    """
    students, teachers = card.names(), card.names("teacher")
    if name is None or name in students:
        return "student"
    if name in teachers and card.teacher_steps is not None:
        return "teacher"
    if name in teachers:
        message = "the teacher is not served here (start the server with --teacher)"
    else:
        known = [*students, *(teachers if card.teacher_steps is not None else ())]
        message = f"no model '{name[:200]}'{nearest(name[:200], known)}"
    raise ApiError(404, message, "model", "model_not_found")


class Sampling(TypedDict):
    """How the teacher samples, as `contract.GenerationRequest` has it."""

    negative_prompt: str | None
    steps: int | None
    guidance_scale: float | None


def read_sampling(body: ImageBody | VideoBody, maker: Maker, card: Card, limits: Limits) -> Sampling:
    """Return how the teacher is to sample.

    Raises:
        ApiError: 400: more steps than are served, a negative prompt that it cannot take, or a student is asked.
    """
    why = {
        "negative_prompt": "it makes pictures without guidance, so there is nothing to put in the null prompt's place",
        "num_inference_steps": f"it was trained for its {len(card.steps)} steps, and for no other number",
        "guidance_scale": "the teacher's guidance was distilled into it, and it runs without",
    }
    if maker == "student":
        for field, reason in why.items():
            if getattr(body, field) is not None:
                raise ApiError(400, f"{field}: '{card.name}' is a distilled student: {reason}; leave it out"
                               f"{_ask_the_teacher(card)}", field, "unsupported_parameter")  # fmt: skip
    elif body.negative_prompt is not None and not card.negative_prompts:
        raise ApiError(400, no_negative_prompt(card), "negative_prompt", "unsupported_parameter")
    if body.negative_prompt is not None and len(body.negative_prompt) > limits.prompt_characters:
        raise ApiError(400, f"negative_prompt: at most {limits.prompt_characters} characters, not "
                       f"{len(body.negative_prompt)}", "negative_prompt", "string_above_max_length")  # fmt: skip
    steps = body.num_inference_steps
    if steps is not None and steps > limits.teacher_steps:
        raise ApiError(400, f"num_inference_steps: at most {limits.teacher_steps} here, not {steps}"[:100],
                       "num_inference_steps", "integer_above_max_value")  # fmt: skip
    return {"negative_prompt": body.negative_prompt, "steps": steps, "guidance_scale": body.guidance_scale}


def _ask_the_teacher(card: Card) -> str:
    return "" if card.teacher_steps is None else f", or ask '{card.names('teacher')[0]}'"


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
