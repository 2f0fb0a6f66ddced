"""``/openapi.json`` is true: whatever is made up by it is answered as it says. And ``/docs``, which shows it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import make_run
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance
from served import api
from test_videos import make_video_run

KEY = "let-me-in"
# Fields that do not go together (a format that loses nothing and its compression) are no schema's to say. Keys have
# tests of their own: here every request has the key, those that are to lack it, too.
LEFT_OUT = [positive_data_acceptance, ignored_auth]
BOUNDED = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def run(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "run", prompts("digits")).folder


@pytest.fixture(scope="module")
def pictures(run: Path) -> Iterator[str]:
    limits = {"n": 3, "teacher_steps": 4}
    with api(run, teacher=True, teacher_steps=3, sizes=[[16, 16]], aliases=["other"], limits=limits) as (url, _):
        yield url


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with api(make_video_run(tmp_path_factory.mktemp("video")), KEY, limits={"jobs": 4}) as (url, _):
        yield url


def check(url: str, left_out: tuple[str, ...] = (), **headers: str) -> set[str]:
    """Make requests up for every operation, right ones and wrong ones, and check answers; return the operations."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in left_out:
            continue
        takes = operation.definition.raw.keys() & {"requestBody", "parameters"}
        modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if takes else [])]

        @BOUNDED
        @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
        def answered(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=LEFT_OUT, headers=headers, timeout=60)

        answered()
        seen.add(operation.definition.raw["operationId"])
    return seen


def test_a_server_of_pictures_is_as_described(pictures: str) -> None:
    assert check(pictures) == {
        "createImage", "getFile", "createVideo", "listVideos", "getVideo", "deleteVideo", "getVideoContent",
        "listModels", "getModel", "health", "metrics",
    }  # fmt: skip


def test_a_server_of_videos_with_keys_is_as_described(videos: str) -> None:
    pictures = ("/v1/images/generations", "/v1/files/{name}", "/health", "/metrics")
    assert len(check(videos, pictures, authorization=f"Bearer {KEY}")) == 7


def test_what_is_described_hangs_on_the_model_and_its_limits(pictures: str, videos: str) -> None:
    tree = httpx.get(f"{pictures}/openapi.json").json()
    assert tree["openapi"].startswith("3.1") and "security" not in tree and "servers" not in tree
    body = tree["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = {name: each.get("anyOf", [each]) for name, each in body["properties"].items()}
    assert fields["prompt"][0]["enum"] == [str(digit) for digit in range(10)]
    assert (fields["n"][0]["maximum"], fields["num_inference_steps"][0]["maximum"]) == (3, 4)
    assert fields["size"][0]["enum"] == ["auto", "8x8", "16x16"]
    assert fields["model"][0]["enum"] == ["tiny", "other", "tiny-teacher", "other-teacher"]
    answer = tree["paths"]["/v1/images/generations"]["post"]["responses"]
    assert answer["400"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorAnswer")
    assert set(answer["200"]["content"]) == {"application/json", "text/event-stream"}
    assert httpx.get(f"{videos}/openapi.json").status_code == 401
    tree = httpx.get(f"{videos}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    assert tree["security"] == [{"key": []}] and tree["paths"]["/health"]["get"]["security"] == []
    forms = tree["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(forms) == {"application/json", "multipart/form-data"}


def test_docs_come_from_here(pictures: str, videos: str) -> None:
    for url in (pictures, videos):  # with keys, too: the page asks for one
        page = httpx.get(f"{url}/docs")
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert not [part for part in ("http:", "https:", "//cdn") if part in page.text]
    named = ("docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/docs.js")
    assert all(f'"{name}"' in page.text for name in named)
    for name in named:
        plain = httpx.get(f"{pictures}/{name}", headers={"accept-encoding": "identity"})
        packed = httpx.get(f"{pictures}/{name}", headers={"accept-encoding": "gzip"})
        assert plain.status_code == packed.status_code == 200 and plain.content == packed.content
        assert packed.headers.get("content-encoding") == ("gzip" if "swagger" in name else None)
    assert b"SwaggerUIBundle" in httpx.get(f"{pictures}/{named[0]}").content
    for path in ("/docs/", "/redoc", "/docs/oauth2-redirect", "/docs/docs.html"):
        assert httpx.get(f"{pictures}{path}").status_code == 404
