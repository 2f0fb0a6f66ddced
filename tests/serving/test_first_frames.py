"""``input_reference``: a video's first frame, by OpenAI's client and by plain requests, on real tiny Wans."""

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from local_serving import serving
from picture_runs import captioned_pictures, encoded_recipe
from PIL import Image
from run_folders import draw_run
from served import api
from test_openapi import check
from test_videos import content, ended, refused

from raydmd import cli
from raydmd.export.export import export_run
from raydmd.runs.run import Run
from raydmd.serving.contract import BadRequest, GenerationRequest
from raydmd.serving.http.first_frame import first_frame_pixels
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Limits

PROMPT = "a wolf"  # of nobody's table
BUCKETS = {"wan_i2v": [[9, 64, 48], [9, 64, 64]], "wan22_i2v": None}
EXACT = {"weights": "switched"}  # as `raydmd generate` has them
LIMITS = {"image_bytes": 60_000, "image_pixels": 20_000}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one network and of Wan 2.2's two; the first has two sizes."""
    made = {}
    for tiny, buckets in BUCKETS.items():
        root = tmp_path_factory.mktemp(tiny)
        made[tiny] = draw_run(encoded_recipe(root, pictures, tiny, buckets), root / "run").folder
    return made


@pytest.fixture(scope="module")
def export(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "lora"
    export_run(Run(runs["wan22_i2v"]), "lora", folder, checked=False)
    return folder


@pytest.fixture(scope="module")
def url(runs: dict[str, Path]) -> Iterator[str]:
    with api(runs["wan_i2v"], teacher=True, teacher_steps=2, limits=LIMITS, **EXACT) as (url, _):
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def generated(folder: Path, out: Path, image: Path, *more: str) -> bytes:
    """Return the video that `raydmd generate` makes."""
    words = ["generate", str(folder), "--prompt", PROMPT, "--image", str(image), "--seed", "3", "--out", str(out)]
    assert cli.run([*words, *more]) == 0
    (file,) = out.iterdir()
    return file.read_bytes()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def made(http: httpx.Client, **sent: Any) -> bytes:
    """Return the video of a request."""
    answer = http.post("/v1/videos", **sent)
    assert answer.status_code == 200, answer.text
    job = ended(http, answer.json())
    assert job["status"] == "completed", job
    return content(http, job).content


def by_json(http: httpx.Client, reference: Any, **more: Any) -> bytes:
    return made(http, json={"prompt": PROMPT, "seed": 3, "input_reference": reference, **more})


def picture(kind: str, size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    """Return a file of noise, with a transparent column where the format has any."""
    draw = np.random.default_rng(5)
    pixels = draw.integers(0, 256, (size[1], size[0], 3 if kind in ("JPEG", "BMP", "GIF") else 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tiny", BUCKETS)
def test_openais_client_sends_a_first_frame(tiny: str, runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """The video is that of `raydmd generate --image`; the file's name and type do not matter."""
    right = generated(runs[tiny], tmp_path / "right", pictures / "2.png")
    assert generated(runs[tiny], tmp_path / "other", pictures / "1.png") != right
    data = (pictures / "2.png").read_bytes()
    with api(runs[tiny], **EXACT) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
        for reference in (pictures / "2.png", ("frame.txt", data, "text/plain")):
            job = ai.videos.create_and_poll(
                prompt=PROMPT, input_reference=reference, poll_interval_ms=20, extra_body={"seed": 3}
            )
            assert job.status == "completed" and ai.videos.download_content(job.id).read() == right


def test_formats_are_told_by_their_content(http: httpx.Client, runs: dict[str, Path], tmp_path: Path) -> None:
    seen = set()
    for kind in ("PNG", "JPEG", "WEBP"):
        data = picture(kind)
        (tmp_path / f"{kind}.png").write_bytes(data)
        right = generated(runs["wan_i2v"], tmp_path / kind, tmp_path / f"{kind}.png")
        url = data_url(data, "image/gif")
        assert by_json(http, url) == by_json(http, url.partition(",")[2]) == by_json(http, {"image_url": url}) == right
        seen.add(right)
    assert len(seen) == 3


def test_it_is_cut_to_the_size_that_is_asked_for(
    http: httpx.Client, runs: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    right = generated(runs["wan_i2v"], tmp_path / "wide", pictures / "0.png", "--size", "64x64")
    data = (pictures / "0.png").read_bytes()
    form = {"prompt": (None, PROMPT), "seed": (None, "3"), "input_reference": ("0.png", data, "image/png")}
    by_url = {"prompt": (None, PROMPT), "seed": (None, "3"), "input_reference[image_url]": (None, data_url(data))}
    assert made(http, files={**form, "size": (None, "64x64")}) == right
    assert made(http, files=form) == made(http, files=by_url) not in (right, b"")


def test_a_caption_of_the_runs_own_needs_none(http: httpx.Client, pictures: Path) -> None:
    own = {"prompt": "two foxes", "seed": 3}
    frames = [data_url((pictures / f"{number}.png").read_bytes()) for number in (2, 1)]
    by_caption = made(http, json=own)
    assert made(http, json={**own, "input_reference": frames[0]}) == by_caption
    assert made(http, json={**own, "input_reference": frames[1]}) != by_caption
    by_teacher = [made(http, json={**own, "model": "tiny-teacher", "input_reference": frame}) for frame in frames]
    assert by_teacher[0] == made(http, json={**own, "model": "tiny-teacher"}) != by_teacher[1]
    answer = http.post("/v1/videos", json={"prompt": "two fixes"})
    words = refused(answer, 400, "prompt")
    assert "did you mean 'two foxes'?; a prompt of your own comes with a first frame: input_reference" in words


def test_layouts_make_the_same(runs: dict[str, Path], pictures: Path) -> None:
    frame = first_frame_pixels((pictures / "2.png").read_bytes(), (48, 64), Limits())
    ask = GenerationRequest(PROMPT, seed=3, output_format="mp4", first_frame=frame)
    own = {"layout": "pipelined", "encoder": "own", "decoder": "own"}
    for tiny in BUCKETS:
        one, other = (local_pipeline(serving(runs[tiny], **way)) for way in ({}, own))
        assert asyncio.run(one.make(ask)).pictures == asyncio.run(other.make(ask)).pictures
        with pytest.raises(BadRequest, match="its pixels are not those of 48x64"):
            asyncio.run(one.check(GenerationRequest(PROMPT, output_format="mp4", first_frame=frame[:-3])))


def test_an_export_has_no_captions(export: Path, runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    right = generated(runs["wan22_i2v"], tmp_path / "run", pictures / "2.png")
    assert generated(export, tmp_path / "export", pictures / "2.png") == right
    with api(export, **EXACT) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        answer = http.post("/v1/videos", json={"prompt": "two foxes"})
        assert "the videos of 'tiny' begin at a picture; send one" in refused(answer, 400, "input_reference")
        assert by_json(http, data_url((pictures / "2.png").read_bytes())) == right
        assert http.get("/v1/models/tiny").json()["raydmd"]["first_frame"] == "required"
        body = http.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
        assert "input_reference" in body["application/json"]["schema"]["required"]


def test_an_export_without_a_first_frame_is_a_line(export: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.run(["generate", str(export), "--prompt", PROMPT, "--out", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "--image: family 'wan' begins at a picture here" in said


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG whose header says that it is large."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


WRONG: list[tuple[str, bytes, int, str]] = [
    ("a text", b"no picture", 400, "it is not a PNG, JPEG or WebP picture"),
    ("nothing", b"", 400, "it is not a PNG, JPEG or WebP picture"),
    ("a GIF", picture("GIF", (9, 9)), 400, "it is not a PNG, JPEG or WebP picture"),
    ("a BMP", picture("BMP", (9, 9)), 400, "it is not a PNG, JPEG or WebP picture"),
    ("cut short", picture("PNG")[:-300], 400, "it cannot be read as a PNG, JPEG or WebP picture: "),
    ("without its data", bomb(64, 48), 400, "it cannot be read as a PNG, JPEG or WebP picture: "),
    ("too large", picture("PNG", (130, 130)), 413, "at most 60000 bytes, not "),
    ("too many pixels", picture("JPEG", (150, 140), quality=20), 400, "at most 20000 pixels"),
    ("a bomb", bomb(12_000, 12_000), 400, "at most 20000 pixels"),
    ("a larger bomb", bomb(60_000, 60_000), 400, "at most 20000 pixels"),
]


@pytest.mark.parametrize(("data", "status", "words"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_no_first_frame(http: httpx.Client, data: bytes, status: int, words: str) -> None:
    """Refused before there is a job, as a form and as JSON."""
    before = http.get("/v1/videos").json()["data"]
    form = {"prompt": (None, PROMPT), "input_reference": ("x.png", data, "image/png")}
    for sent in ({"files": form}, {"json": {"prompt": PROMPT, "input_reference": data_url(data)}}):
        said = refused(http.post("/v1/videos", **sent), status, "input_reference")  # type: ignore[arg-type]
        assert said.startswith(f"input_reference: {words}") and "\n" not in said and "0x" not in said
    assert http.get("/v1/videos").json()["data"] == before


def test_how_it_is_not_sent(http: httpx.Client) -> None:
    data = picture("PNG", (9, 9))
    wrong: list[tuple[Any, str]] = [
        ("https://example.com/fox.png", "addresses are not fetched here"), ("!", "neither a data URL nor"),
        ({"image_url": "http://127.0.0.1/fox.png"}, "addresses are not fetched here"), ({}, "image_url alone"),
        ({"file_id": "file-1"}, "none are kept here by file_id"), ("data:image/png,abc", "a data URL in Base64"),
        ({"image_url": data_url(data), "x": "1"}, "image_url alone"), ("data:image/png;base64", "a data URL in Base64"),
        (7, "string"), ([data_url(data)], "string"), ({"image_url": 7}, "string"),
    ]  # fmt: skip
    for reference, words in wrong:
        answer = http.post("/v1/videos", json={"prompt": PROMPT, "input_reference": reference})
        assert words in refused(answer, 400, "input_reference"), reference
    file = ("x.png", data, "image/png")
    twice = {"prompt": (None, PROMPT), "input_reference": file, "input_reference[image_url]": (None, data_url(data))}
    assert "it is there twice" in refused(http.post("/v1/videos", files=twice), 400, "input_reference")
    other = {"prompt": (None, PROMPT), "image": file}
    assert "input_reference at POST /v1/videos" in refused(http.post("/v1/videos", files=other), 400, "image")
    larger = http.post("/v1/videos", json={"prompt": PROMPT, "input_reference": "A" * 200_000})
    assert "the body is larger than" in refused(larger, 413)


def test_it_is_described(http: httpx.Client, url: str) -> None:
    about = http.get("/v1/models/tiny").json()["raydmd"]
    assert about["first_frame"] == "optional" and about["limits"]["image_bytes"] == LIMITS["image_bytes"]
    body = http.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    form, json = (body[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert form["properties"]["input_reference"]["format"] == "binary" and json["required"] == ["prompt"]
    assert "at most 60000 bytes and 20000 pixels" in json["properties"]["input_reference"]["description"]
    others = ("/v1/images/generations", "/v1/files/{name}", "/v1/models", "/v1/models/{model}", "/health", "/metrics")
    assert "createVideo" in check(url, others)
