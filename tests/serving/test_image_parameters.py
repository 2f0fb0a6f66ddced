"""Every parameter of OpenAI's images API, and those of other servers like this: obeyed, or refused by name."""

import io
import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from run_folders import make_run
from served import api

from raydmd.serving.contract import partial_steps
from raydmd.serving.http.schemas import SEEDS

GENERATIONS = "/v1/images/generations"
STEPS, TEACHER_STEPS = 4, 3
STARTS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}


@pytest.fixture(scope="module")
def run(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "run", prompts("digits")).folder


@pytest.fixture(scope="module")
def url(run: Path):
    limits = {"n": 6, "teacher_steps": 8}
    settings: dict[str, Any] = {"aliases": ["gpt-image-1", "old/name"], "limits": limits, "sizes": [[64, 64]]}
    with api(run, teacher=True, teacher_steps=TEACHER_STEPS, **settings) as (address, _):
        yield address


@pytest.fixture(scope="module")
def http(url: str):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post(GENERATIONS, json={"prompt": "3", "seed": 1, **body})


def answer(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = ask(http, **body)
    assert response.status_code == 200, response.text
    return response.json()


def files(http: httpx.Client, **body: Any) -> list[bytes]:
    return [b64decode(one["b64_json"]) for one in answer(http, **body)["data"]]


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("L")).astype(int)


def events(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    blocks = ask(http, stream=True, **body).text.strip().split("\n\n")
    return [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]


def refused(response: httpx.Response, param: str) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and param in error["message"] and error["type"] == "invalid_request_error"
    return error["message"]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_compression_is_obeyed(http: httpx.Client, kind: str) -> None:
    (small,), (large,), (own,) = (
        files(http, output_format=kind, size="64x64", **({} if quality is None else {"output_compression": quality}))
        for quality in (0, 100, None)
    )
    assert len(small) < len(own) < len(large) and all(file.startswith(STARTS[kind]) for file in (small, large))
    (exact,) = files(http, size="64x64")
    assert abs(pixels(large) - pixels(exact)).mean() < abs(pixels(small) - pixels(exact)).mean()


def test_png_loses_nothing_and_says_so(http: httpx.Client) -> None:
    assert files(http, output_compression=100) == files(http)
    assert "jpeg" in refused(ask(http, output_compression=99), "output_compression")
    refused(ask(http, output_compression=99, output_format="png", stream=True), "output_compression")


OBEYED = [
    {"quality": "auto"}, {"quality": "standard"}, {"background": "auto"}, {"background": "opaque"},
    {"moderation": "low"}, {"moderation": "auto"}, {"style": None}, {"n": None}, {"partial_images": 0},
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quality": "high"}, "one quality"), ({"quality": "hd"}, "one quality"),
    ({"background": "transparent"}, "transparency"), ({"moderation": "high"}, "'low'"), ({"style": "vivid"}, "prompt"),
    ({"svg": {"model": "x"}}, "pixels"), ({"frame_count": 9}, "GIF"), ({"input_fidelity": "high"}, "first frame"),
    ({"true_cfg_scale": 4.0}, "guidance_scale"), ({"width": 64}, "size"), ({"output_format": "gif"}, "'png'"),
    ({"output_format": "svg"}, "'png'"), ({"output_format": "jpeg", "output_compression": 101}, "100"),
    ({"partial_images": 4, "stream": True}, "3"), ({"partial_images": 1}, "stream"),
    ({"step_previews": True}, "stream"), ({"user": [1]}, "string"), ({"user": "u" * 1001}, "1000"),
]  # fmt: skip


@pytest.mark.parametrize("body", OBEYED, ids=str)
def test_what_means_the_default_is_let_pass(http: httpx.Client, body: dict[str, Any]) -> None:
    assert files(http, **body) == files(http)


@pytest.mark.parametrize(("body", "hint"), REFUSED, ids=str)
def test_what_cannot_be_obeyed_is_refused_by_name(http: httpx.Client, body: dict[str, Any], hint: str) -> None:
    names = [name for name in body if name not in ("stream", "output_format")] or ["output_format"]
    assert hint in refused(ask(http, **body), names[0])


def test_who_asked_is_said_again(http: httpx.Client) -> None:
    assert answer(http, user="u")["safety_identifier"] == "u"
    assert answer(http, user="u", safety_identifier="s")["safety_identifier"] == "s"
    assert "safety_identifier" not in answer(http, user="")


def test_steps_with_a_picture_are_evenly_spread() -> None:
    assert [partial_steps(count, 50) for count in range(4)] == [[], [25], [17, 33], [12, 25, 38]]
    for of in range(1, 40):
        for count in range(4):
            numbers = partial_steps(count, of)
            assert len(set(numbers)) == len(numbers) <= min(count, of - 1) and all(0 < i < of for i in numbers)
            assert len(numbers) == count or of <= count + 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_partial_images_are_of_the_format_that_is_asked_for(http: httpx.Client, kind: str) -> None:
    quiet = events(http, output_format=kind)
    assert [event["type"] for event in quiet] == ["image_generation.completed"]
    said = events(http, output_format=kind, partial_images=3, size="64x64", n=2)
    partial, done = said[:-2], said[-2:]
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * 6
    assert [event["partial_image_index"] for event in partial] == [0, 0, 1, 1, 2, 2]
    assert [event["index"] for event in partial] == [0, 1] * 3
    assert [event["step"] for event in partial] == [1, 1, 2, 2, 3, 3]
    for event in said:
        assert event["output_format"] == kind and event["size"] == "64x64" and event["background"] == "opaque"
        file = b64decode(event["b64_json"])
        assert file.startswith(STARTS[kind]) and Image.open(io.BytesIO(file)).size == (64, 64)
    assert len({event["b64_json"] for event in said}) == len(said)
    assert [b64decode(event["b64_json"]) for event in done] == files(http, output_format=kind, size="64x64", n=2)


def test_openais_client_finds_usage_wherever_it_looks(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
        made = ai.images.generate(prompt="7", n=3, extra_body={"seed": 5})
        assert made.usage is not None and made.usage.input_tokens_details.text_tokens == made.usage.input_tokens == 1
        assert made.usage.output_tokens == 3 * 64 and made.usage.total_tokens == 3 * 64 + 1
        *partial, done = ai.images.generate(prompt="7", stream=True, partial_images=2, extra_body={"seed": 5})
        assert [event.type.split(".")[1] for event in partial] == ["partial_image"] * 2
        assert done.type == "image_generation.completed" and done.usage.total_tokens == 65
        assert done.b64_json == made.data[0].b64_json and done.quality == "auto"


def test_a_seed_that_is_none_is_random_and_told(http: httpx.Client) -> None:
    seeds = [answer(http, **body)["seed"] for body in ({"seed": None}, {"seed": -1}, {"seed": -1})]
    assert len(set(seeds)) == 3 and all(0 <= seed < SEEDS for seed in seeds)
    free = answer(http, seed=-1)
    assert files(http, seed=free["seed"]) == [b64decode(free["data"][0]["b64_json"])]
    (event,) = events(http, seed=-1)
    assert files(http, seed=event["seed"]) == [b64decode(event["b64_json"])]


def test_several_prompts_are_several_requests_of_one_seed(http: httpx.Client) -> None:
    made = answer(http, prompt=["3", "7"], n=2)
    assert [(one["prompt"], one["sample"]) for one in made["data"]] == [("3", 0), ("3", 1), ("7", 0), ("7", 1)]
    assert files(http, prompt=["3", "7"], n=2) == files(http, prompt="3", n=2) + files(http, prompt="7", n=2)
    assert made["usage"]["input_tokens"] == 2 and made["usage"]["output_tokens"] == 4 * 64
    said = events(http, prompt=["3", "7"], partial_images=1)
    assert [event["prompt"] for event in said] == ["3", "7"] * 2
    assert [b64decode(event["b64_json"]) for event in said[2:]] == files(http, prompt=["3", "7"])
    assert answer(http, prompt=["3"])["data"][0]["prompt"] == "3"
    assert "6 pictures" in refused(ask(http, prompt=["3"] * 4, n=2), "prompt")
    for wrong in ([], ["3", ""], ["3", 4], ["3", "eleven"]):
        refused(ask(http, prompt=wrong), "prompt")


def test_a_teacher_takes_steps_and_guidance(http: httpx.Client) -> None:
    teacher = {"model": "tiny-teacher"}
    own = answer(http, **teacher)
    assert own["num_inference_steps"] == TEACHER_STEPS and own["guidance_scale"] > 1
    same = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": own["guidance_scale"]}
    assert files(http, **teacher, **same) == files(http, **teacher)
    more = {"num_inference_steps": 7, "guidance_scale": 6}
    said = events(http, step_previews=True, **teacher, **more)
    assert [event.get("steps") for event in said[:-1]] == [7] * 7
    assert (said[-1]["num_inference_steps"], said[-1]["guidance_scale"]) == (7, 6.0)
    assert [b64decode(said[-1]["b64_json"])] == files(http, **teacher, **more)
    different = [
        files(http, **teacher, **some) for some in ({}, more, {"num_inference_steps": 7}, {"guidance_scale": 1})
    ]
    assert len({file for (file,) in different}) == 4
    assert "at most 8" in refused(ask(http, **teacher, num_inference_steps=9), "num_inference_steps")
    refused(ask(http, **teacher, num_inference_steps=0), "num_inference_steps")
    refused(ask(http, **teacher, guidance_scale=-1), "guidance_scale")
    assert "text encoder" in refused(ask(http, **teacher, negative_prompt="4"), "negative_prompt")


@pytest.mark.parametrize(
    "field", [{"negative_prompt": ""}, {"num_inference_steps": 4}, {"guidance_scale": 1.0}], ids=str
)
def test_a_student_says_why_it_takes_none(http: httpx.Client, field: dict[str, Any]) -> None:
    message = refused(ask(http, **field), next(iter(field)))
    assert "distilled student" in message and "'tiny-teacher'" in message


def test_a_model_has_several_names(http: httpx.Client) -> None:
    listed = {one["id"]: one["raydmd"]["alias_of"] for one in http.get("/v1/models").json()["data"]}
    assert listed == {
        "tiny": None, "gpt-image-1": "tiny", "old/name": "tiny",
        "tiny-teacher": None, "gpt-image-1-teacher": "tiny-teacher", "old/name-teacher": "tiny-teacher",
    }  # fmt: skip
    for name in ("gpt-image-1", "old/name"):
        assert http.get(f"/v1/models/{name}").json()["id"] == name
        assert files(http, model=name) == files(http) and answer(http, model=name)["model"] == "tiny"
        assert files(http, model=f"{name}-teacher") == files(http, model="tiny-teacher")
    assert "did you mean 'gpt-image-1'" in ask(http, model="gpt-image-2").json()["error"]["message"]


def test_a_png_says_what_it_is(http: httpx.Client) -> None:
    (first, second) = files(http, seed=12, n=2)
    assert [Image.open(io.BytesIO(file)).text for file in (first, second)] == [
        {"prompt": "3", "seed": "12", "sample": str(i), "model": "tiny"} for i in range(2)
    ]
    (teacher,) = files(http, seed=12, model="gpt-image-1-teacher")
    assert Image.open(io.BytesIO(teacher)).text["model"] == "tiny-teacher"
    assert files(http, seed=12, n=3)[:2] == [first, second]  # what a file says does not hang on its neighbours
