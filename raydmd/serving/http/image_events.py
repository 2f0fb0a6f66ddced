"""A stream's events, as OpenAI's, and what is said of each picture in any answer."""

import json
import time
from typing import Any

from raydmd.serving.contract import GenerationRequest, GenerationResult, Step
from raydmd.serving.http.raw_json import array, base64, json_with
from raydmd.serving.http.schemas import size_text

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
STEP = "image_generation.step"  # none of OpenAI's: sent to who asks for step_previews


def milliseconds(result: GenerationResult) -> dict[str, float]:
    """Return what each stage took."""
    return {stage: round(1000 * seconds, 3) for stage, seconds in result.seconds.items()}


def usage(result: GenerationResult, picture: int | None = None) -> dict[str, Any]:
    """Return what was read and made in tokens, of all pictures or of one, in the form of OpenAI's usage.

    A text token is a row of the prompt's embeddings that the network reads; each prompt counts once. An image token is
    a position of the latents.
    """
    pictures, prompts = len(result.pictures), len(result.text_tokens)
    if picture is None:
        text, image = sum(result.text_tokens), pictures * result.image_tokens
    else:
        text, image = result.text_tokens[picture * prompts // pictures] if prompts else 0, result.image_tokens
    return {
        "input_tokens": text, "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": image, "total_tokens": text + image,
    }  # fmt: skip


def of_prompt(request: GenerationRequest, picture: int) -> bytes:
    """Return JSON that says of which of several prompts a picture is, to be put into its object; else nothing."""
    if isinstance(request.prompt, str):
        return b""
    of = {"prompt": request.prompts[picture // request.n], "sample": picture % request.n}
    return b", " + json.dumps(of).encode()[1:-1]


def _common(kind: str, request: GenerationRequest) -> dict[str, Any]:
    assert request.size is not None
    return {"type": kind, "created_at": int(time.time()), "size": size_text(request.size),
            "output_format": request.output_format}  # fmt: skip


def _picture(request: GenerationRequest, picture: int) -> dict[str, Any]:
    """Return which of the pictures one is."""
    of = {} if isinstance(request.prompt, str) else {"prompt": request.prompts[picture // request.n]}
    return {"index": picture, **of, "background": "opaque", "quality": "auto"}


def step_event(request: GenerationRequest, step: Step) -> bytes:
    """Return a step with a picture of what it promises for each sample."""
    about = {
        **_common(STEP, request), "step": step.number, "steps": step.of, "made_by": step.made_by, "t": step.t,
        "t_next": step.t_next, "seconds": step.seconds,
    }  # fmt: skip
    return json_with(about, pictures=array(base64(picture) for picture in step.pictures))


def partial_event(request: GenerationRequest, step: Step, picture: int, number: int) -> bytes:
    """Return an unfinished picture: the ``number``-th of its like, from 0."""
    about = {**_common(PARTIAL, request), "partial_image_index": number, **_picture(request, picture)}
    more = {"step": step.number, "steps": step.of}
    return json_with({**about, **more}, b64_json=base64(step.pictures[picture]))


def completed_event(request: GenerationRequest, result: GenerationResult, picture: int, about: dict[str, Any]) -> bytes:
    """Return a finished picture, with what the answer says of all."""
    fields = {**_common(COMPLETED, request), **_picture(request, picture), "usage": usage(result, picture), **about}
    return json_with(fields, b64_json=base64(result.pictures[picture]))
