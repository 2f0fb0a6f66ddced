"""A stream's events, as OpenAI's, and what is said of each picture in any answer."""

import json
import time
from typing import Any

from raydmd.serving.contract import Ask, Made, Step
from raydmd.serving.http.raw_json import array, base64, json_with
from raydmd.serving.http.schemas import size_text

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
STEP = "image_generation.step"  # none of OpenAI's: sent to who asks for step_previews


def milliseconds(made: Made) -> dict[str, float]:
    """Return what each stage took."""
    return {stage: round(1000 * seconds, 3) for stage, seconds in made.seconds.items()}


def usage(made: Made, picture: int | None = None) -> dict[str, Any]:
    """Return what was read and made in tokens, of all pictures or of one, in the form of OpenAI's usage.

    A text token is a row of the prompt's embeddings that the network reads; each prompt counts once. An image token is
    a position of the latents.
    """
    pictures, prompts = len(made.pictures), len(made.text_tokens)
    if picture is None:
        text, image = sum(made.text_tokens), pictures * made.image_tokens
    else:
        text, image = made.text_tokens[picture * prompts // pictures] if prompts else 0, made.image_tokens
    return {
        "input_tokens": text, "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": image, "total_tokens": text + image,
    }  # fmt: skip


def of_prompt(ask: Ask, picture: int) -> bytes:
    """Return JSON that says of which of several prompts a picture is, to be put into its object; else nothing."""
    if isinstance(ask.prompt, str):
        return b""
    of = {"prompt": ask.prompts[picture // ask.n], "sample": picture % ask.n}
    return b", " + json.dumps(of).encode()[1:-1]


def _common(kind: str, ask: Ask) -> dict[str, Any]:
    assert ask.size is not None
    return {"type": kind, "created_at": int(time.time()), "size": size_text(ask.size),
            "output_format": ask.output_format}  # fmt: skip


def _picture(ask: Ask, picture: int) -> dict[str, Any]:
    """Return which of the pictures one is."""
    of = {} if isinstance(ask.prompt, str) else {"prompt": ask.prompts[picture // ask.n]}
    return {"index": picture, **of, "background": "opaque", "quality": "auto"}


def step_event(ask: Ask, step: Step) -> bytes:
    """Return a step with a picture of what it promises for each sample."""
    about = {
        **_common(STEP, ask), "step": step.number, "steps": step.of, "made_by": step.made_by, "t": step.t,
        "t_next": step.t_next, "seconds": step.seconds,
    }  # fmt: skip
    return json_with(about, pictures=array(base64(picture) for picture in step.pictures))


def partial_event(ask: Ask, step: Step, picture: int, number: int) -> bytes:
    """Return an unfinished picture: the ``number``-th of its like, from 0."""
    about = {**_common(PARTIAL, ask), "partial_image_index": number, **_picture(ask, picture)}
    more = {"step": step.number, "steps": step.of}
    return json_with({**about, **more}, b64_json=base64(step.pictures[picture]))


def completed_event(ask: Ask, made: Made, picture: int, about: dict[str, Any]) -> bytes:
    """Return a finished picture, with what the answer says of all."""
    fields = {**_common(COMPLETED, ask), **_picture(ask, picture), "usage": usage(made, picture), **about}
    return json_with(fields, b64_json=base64(made.pictures[picture]))
