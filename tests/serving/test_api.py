"""The HTTP API for pictures: OpenAI's client and plain requests against a real server and a real tiny model."""

import asyncio
import io
import json
import logging
from base64 import b64decode

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from run_folders import make_run
from served import LONG, api, connect, request_bytes, server, until

from raydmd.serving.contract import GenerationRequest, GenerationResult, Unavailable
from raydmd.serving.http import make_app
from raydmd.serving.http.keys import Keys
from raydmd.serving.http.page import PAGE, Page
from raydmd.serving.http.store import Store
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Serving

GENERATIONS = "/v1/images/generations"
STEPS = 4


@pytest.fixture(scope="module")
def run(quick, prompts, tmp_path_factory):
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "run", prompts("digits")).folder


@pytest.fixture(scope="module")
def quickly(run):
    with api(run, teacher=True, teacher_steps=3, sizes=[[16, 16]], limits={"n": 4, "body_bytes": 8192}) as (url, made):
        yield url, made


@pytest.fixture(scope="module")
def slowly(run):
    """A server whose teacher takes minutes; it lets two samples in."""
    with api(run, teacher=True, teacher_steps=LONG, queue_samples=2) as (url, backend):
        yield url, backend


@pytest.fixture(scope="module")
def http(quickly):
    with httpx.Client(base_url=quickly[0], timeout=60) as client:
        yield client


def client(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(http, **body):
    return http.post(GENERATIONS, json={"prompt": "3", **body})


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return [b64decode(one["b64_json"]) for one in answer.json()["data"]]


def events(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def figure(http, name, **labels):
    """Return a metric's value."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    values = [s.value for family in families for s in family.samples if s.name == name and s.labels == labels]
    return values[0] if values else 0.0


def error(answer, status):
    """Return the error object of an answer that must have one."""
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"type", "message", "param", "code"} and found["message"] and "\n" not in found["message"]
    return found


def test_openais_client_is_given_pictures(quickly):
    url, backend = quickly
    with client(url) as ai:
        made = ai.images.generate(prompt="7", model="tiny", n=2, size="8x8", quality="auto", extra_body={"seed": 5})
    assert made.size == "8x8" and made.output_format == "png" and made.background == "opaque"
    assert made.seed == 5 and made.model == "tiny" and made.revision == backend.card().revision
    assert made.batches["expert-1"] == 2 and made.timings["expert-1"] > 0
    images = [Image.open(io.BytesIO(b64decode(one.b64_json))) for one in made.data]
    assert [image.size for image in images] == [(8, 8)] * 2
    with pytest.raises(openai.BadRequestError) as refused, client(url) as ai:
        ai.images.generate(prompt="eleven")
    assert refused.value.param == "prompt" and refused.value.status_code == 400


def seen(answer):
    """Return pixels: what a PNG says of itself differs with prompt and seed, whatever it shows."""
    return [Image.open(io.BytesIO(file)).tobytes() for file in pictures(answer)]


def test_a_seed_is_a_picture(http):
    one = pictures(ask(http, seed=1, n=1))
    shown = seen(ask(http, seed=1, n=1))
    assert pictures(ask(http, seed=1, n=3))[:1] == one
    assert seen(ask(http, seed=2, n=1)) != shown
    assert seen(ask(http, seed=1, n=1, prompt="4")) != shown
    free = ask(http)
    assert pictures(ask(http, seed=free.json()["seed"])) == pictures(free)
    assert ask(http).json()["seed"] != free.json()["seed"]
    assert seen(ask(http, seed=2**63 - 1)) != shown
    teacher = ask(http, seed=1, model="tiny-teacher")
    assert seen(teacher) != shown and teacher.json()["model"] == "tiny-teacher"


def test_formats_and_sizes(http):
    for output_format in ("png", "jpeg", "webp"):
        (picture,) = pictures(ask(http, seed=1, output_format=output_format, size="16x16"))
        image = Image.open(io.BytesIO(picture))
        assert image.format == output_format.upper() and image.size == (16, 16)
    assert ask(http, size="auto").json()["size"] == "8x8"


def test_urls_are_refused_where_another_replica_might_be_asked_for_them(run):
    with api(run, stages={"api": {"max": 2}}) as (url, _):
        answer = httpx.post(f"{url}{GENERATIONS}", json={"prompt": "3", "response_format": "url"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
        assert httpx.post(f"{url}{GENERATIONS}", json={"prompt": "3"}).status_code == 200


def test_pictures_by_url(quickly, http):
    answer = ask(http, seed=1, n=2, response_format="url", output_format="webp")
    urls = [one["url"] for one in answer.json()["data"]]
    assert all(url.startswith(f"{quickly[0]}/v1/files/") and url.endswith(".webp") for url in urls)
    assert len(set(urls)) == 2
    got = [http.get(url) for url in urls]
    assert {one.headers["content-type"] for one in got} == {"image/webp"}
    assert [one.content for one in got] == pictures(ask(http, seed=1, n=2, output_format="webp"))
    error(http.get("/v1/files/none.webp"), 404)
    body = {"prompt": "3", "response_format": "url"}
    for host, origin in (("example.org:81", "http://example.org:81"), ("a b<x>", quickly[0]), ("", quickly[0])):
        (one,) = http.post(GENERATIONS, json=body, headers={"host": host}).json()["data"]
        assert one["url"].startswith(f"{origin}/v1/files/")


def test_what_is_kept_is_bounded():
    store = Store(10, 3600.0)
    assert store.put({"a": b"1234"}, "x") and store.put({"b": b"5678"}, "x")
    assert not store.put({"c": b"0" * 11}, "x") and store.get("a") is not None
    assert store.put({"c": b"123"}, "x")
    assert store.get("a") is None and store.get("b") is not None and store.bytes == 7
    store.remove("b")
    assert store.get("b") is None and store.bytes == 3
    forgetful = Store(10, 0.0)
    assert forgetful.put({"a": b"1"}, "x") and forgetful.get("a") is None and forgetful.bytes == 0


def test_every_step_as_an_event(http):
    said = events(ask(http, seed=1, n=2, stream=True, step_previews=True))
    names = [name for name, _ in said]
    assert names == ["image_generation.step"] * STEPS + ["image_generation.completed"] * 2
    assert all(data["type"] == name for name, data in said)
    steps, done = [data for _, data in said[:STEPS]], [data for _, data in said[STEPS:]]
    assert [(step["step"], step["steps"]) for step in steps] == [(i + 1, STEPS) for i in range(STEPS)]
    assert [step["made_by"] for step in steps] == ["expert-1", "expert-1", "expert-2", "expert-2"]
    assert [step["t"] for step in steps][1:] == [step["t_next"] for step in steps][:-1]
    assert all(len(step["pictures"]) == 2 for step in steps)
    assert len({step["pictures"][0] for step in steps}) == STEPS
    assert [b64decode(one["b64_json"]) for one in done] == pictures(ask(http, seed=1, n=2))
    assert [one["index"] for one in done] == [0, 1]
    assert done[0]["seed"] == 1 and done[0]["timings"].keys() >= {"expert-1", "expert-2", "total"}
    assert done[0]["revision"]


REFUSED = [
    ({"prompt": "3", "sead": 1}, 400, "sead", "did you mean 'seed'"),
    ({"n": 1}, 400, "prompt", "required"),
    ({"prompt": " "}, 400, "prompt", "empty"),
    ({"prompt": "3" * 4001}, 400, "prompt", "4000"),
    ({"prompt": 3}, 400, "prompt", "string"),
    ({"prompt": "three"}, 400, "prompt", "3"),
    ({"prompt": "3", "n": 5}, 400, "n", "at most 4"),
    ({"prompt": "3", "n": 0}, 400, "n", "greater"),
    ({"prompt": "3", "n": "2"}, 400, "n", "integer"),
    ({"prompt": "3", "n": True}, 400, "n", "integer"),
    ({"prompt": "3", "seed": -2}, 400, "seed", "greater"),
    ({"prompt": "3", "seed": 2**63}, 400, "seed", "less"),
    ({"prompt": "3", "size": "9x9"}, 400, "size", "16x16"),
    ({"prompt": "3", "size": "large"}, 400, "size", "WIDTHxHEIGHT"),
    ({"prompt": "3", "output_format": "gif"}, 400, "output_format", "'png'"),
    ({"prompt": "3", "partial_images": -1}, 400, "partial_images", "greater"),
    ({"prompt": "3", "stream": True, "response_format": "url"}, 400, "response_format", "b64_json"),
    ({"prompt": "3", "model": "tiny-teecher"}, 404, "model", "did you mean 'tiny-teacher'"),
    ([], 400, None, "object"),
    ("3", 400, None, "object"),
]


@pytest.mark.parametrize(("body", "status", "param", "hint"), REFUSED)
def test_what_is_wrong_is_named(http, body, status, param, hint):
    found = error(http.post(GENERATIONS, json=body), status)
    assert found["type"] == "invalid_request_error" and found["param"] == param and hint in found["message"]


def test_routes_methods_and_types(http):
    assert "did you mean '/v1/models'" in error(http.get("/v1/model"), 404)["message"]
    assert "did you mean" in error(http.post(f"{GENERATIONS}/", json={}), 404)["message"]
    wrong = http.delete(GENERATIONS)
    assert error(wrong, 405) and wrong.headers["allow"] == "POST"
    assert http.put("/v1/videos").headers["allow"] == "GET, HEAD, POST"
    assert "application/json" in error(http.post(GENERATIONS, data={"prompt": "3"}), 415)["message"]
    error(http.post(GENERATIONS, content=b'{"prompt": "3"}'), 415)
    broken = http.post(GENERATIONS, content=b'{"prompt": ', headers={"content-type": "application/json"})
    assert "JSON" in error(broken, 400)["message"]
    assert http.head("/v1/models").status_code == 200
    assert "POST /v1/images/generations" in error(http.post("/v1/videos", json={"prompt": "3"}), 400)["message"]


def test_models_and_health(quickly, http):
    with client(quickly[0]) as ai:
        assert [model.id for model in ai.models.list()] == ["tiny", "tiny-teacher"]
        model = ai.models.retrieve("tiny")
        with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'"):
            ai.models.retrieve("tinny")
    about = model.raydmd
    assert about["kind"] == "image" and about["family"] == "digits" and about["sizes"] == ["8x8", "16x16"]
    assert len(about["steps"]) == STEPS and about["teacher"] == {"id": "tiny-teacher", "steps": 3}
    assert about["prompts"] == [str(digit) for digit in range(10)]
    health = http.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"


def test_a_teacher_that_is_not_served(run):
    with api(run) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny"]
        assert "--teacher" in error(ask(http, model="tiny-teacher"), 404)["message"]
        assert "tiny-teacher" not in error(ask(http, model="tony"), 404)["message"]


def test_keys(run, caplog):
    caplog.set_level(logging.INFO, "raydmd.serving.http")
    with api(run, "sesame", "other") as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        for key in ("sesame", "other"):
            with client(url, key) as ai:
                assert ai.images.generate(prompt="3").data
        with pytest.raises(openai.AuthenticationError), client(url, "sesam") as ai:
            ai.images.generate(prompt="3")
        assert "no API key" in error(http.get("/v1/models"), 401)["message"]
        assert "wrong" in error(http.get("/v1/models", headers={"authorization": "Bearer x"}), 401)["message"]
        error(http.get("/v1/models", headers={"authorization": "Basic sesame"}), 401)
        error(http.get("/nowhere"), 401)
        body = {"prompt": "5", "response_format": "url"}
        made = http.post(GENERATIONS, json=body, headers={"authorization": "bearer sesame"}).json()
        assert http.get(made["data"][0]["url"]).status_code == 200
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
    assert "sesam" not in caplog.text
    names = {
        Keys(Serving(run=str(run)), ["a", "b"]).owner("/v1/videos", f"Bearer {key}".encode()) for key in ("a", "b")
    }
    assert len(names) == 2 and "a" not in names


def test_a_line_and_figures_for_each_request(http, caplog):
    caplog.set_level(logging.INFO, "raydmd.serving.http")
    labels = {"route": GENERATIONS, "status": "200"}
    before = figure(http, "raydmd_http_requests_total", **labels)
    samples = figure(http, "raydmd_samples_total", maker="student")
    answer = http.post(GENERATIONS, json={"prompt": "3", "n": 2}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1" and answer.headers["openai-processing-ms"].isdigit()
    odd = http.post(GENERATIONS, json={"prompt": "secret"}, headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"].startswith("req_")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "raydmd.serving.http"]
    (line,) = [line for line in lines if line["request_id"] == "mine-1"]
    assert line["status"] == 200 and line["route"] == GENERATIONS and line["ms"] > 0
    assert "secret" not in caplog.text
    assert figure(http, "raydmd_http_requests_total", **labels) == before + 1
    assert figure(http, "raydmd_samples_total", maker="student") == samples + 2
    assert figure(http, "raydmd_stage_seconds_count", stage="expert-2") > 0
    assert figure(http, "raydmd_batch_samples_count", stage="decode") > 0
    assert figure(http, "raydmd_http_in_flight") == 1  # the request for the figures
    http.get("/some/where/else")
    assert figure(http, "raydmd_http_requests_total", route="other", status="404") > 0


def call(app, body=b"", headers=(), receive=None, method="POST", path=GENERATIONS):
    """Return a coroutine that calls an app without a server; its result is the messages sent."""
    sent = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_body():
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json"), *headers], "server": ("x", 80), "client": ("y", 1),
    }  # fmt: skip

    async def made():
        await app(scope, receive or receive_body, send)
        return sent

    return made()


def test_a_large_body_is_not_read(quickly, http, run):
    json_type = {"content-type": "application/json"}
    error(http.post(GENERATIONS, content=b'{"prompt": "3"}'.ljust(9000), headers=json_type), 413)
    assert http.post(GENERATIONS, content=b'{"prompt": "3"}'.ljust(7000), headers=json_type).status_code == 200
    serving = Serving(run=str(run), limits={"body_bytes": 1000})
    app = make_app(quickly[1], serving, frozenset())
    reads = 0

    async def endless():
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    assert asyncio.run(call(app, receive=endless))[0]["status"] == 413
    assert reads == 11
    assert asyncio.run(call(app, headers=[(b"content-length", b"1001")], receive=endless))[0]["status"] == 413
    assert reads == 11


def test_a_client_that_leaves_stops_its_work_alone(slowly):
    url, backend = slowly
    working = backend.links["teacher"]
    with httpx.Client(base_url=url, timeout=60) as http:
        gone = figure(http, "raydmd_http_requests_total", route=GENERATIONS, status="499")
        for number, stream in enumerate((False, True), start=1):
            with connect(url) as leaver:
                body = {"prompt": "3", "model": "tiny-teacher", "stream": stream, "step_previews": stream}
                leaver.sendall(request_bytes(GENERATIONS, body))
                until(lambda: backend.queued() == 1, "the teacher begins")
                if stream:
                    assert b"200 OK" in leaver.recv(100)
                assert pictures(ask(http, seed=1)) == pictures(ask(http, seed=1))
                assert backend.queued() == 1 and not working._working.done()
            until(lambda: backend.queued() == 0, "its place is free")
            until(lambda: working._working.done(), "the stage has left it undone")
            route = {"route": GENERATIONS, "status": "499"}
            until(lambda: figure(http, "raydmd_http_requests_total", **route) == gone + number, "it is counted")  # noqa: B023
        assert ask(http).status_code == 200


def test_a_call_that_is_cancelled_stops_its_work(slowly, run):
    """As Ray Serve does it when a client leaves."""
    backend = local_pipeline(Serving(run=str(run), teacher=True, teacher_steps=LONG))
    app = make_app(backend, backend.serving, frozenset())

    async def both(stream):
        body = json.dumps({"prompt": "3", "model": f"{run.name}-teacher", "stream": stream}).encode()
        leaver = asyncio.create_task(call(app, body))
        while backend.queued() < 1 and not leaver.done():
            await asyncio.sleep(0.01)
        stayer = asyncio.create_task(call(app, b'{"prompt": "3"}'))
        assert (await stayer)[0]["status"] == 200
        assert backend.queued() == 1 and not leaver.done()
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert backend.queued() == 0
        await backend.links["teacher"]._working
        return b"".join([message.get("body", b"") for message in await call(app, method="GET", path="/metrics")])

    for number, stream in enumerate((False, True), start=1):
        counted = asyncio.run(both(stream)).decode()
        assert f'raydmd_http_requests_total{{route="{GENERATIONS}",status="499"}} {number}.0' in counted


def test_more_than_can_be_made_is_refused(slowly):
    url, backend = slowly
    with httpx.Client(base_url=url, timeout=60) as http:
        with connect(url) as leaver:
            leaver.sendall(request_bytes(GENERATIONS, {"prompt": "3", "model": "tiny-teacher", "n": 2}))
            until(lambda: backend.queued() == 2, "the teacher begins")
            refused = ask(http, model="tiny-teacher")
            assert error(refused, 429)["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
            assert error(ask(http, stream=True, model="tiny-teacher"), 429)
            with pytest.raises(openai.RateLimitError), client(url) as ai:
                ai.images.generate(prompt="3", model="tiny-teacher")
            assert ask(http).status_code == 200  # the student's do not wait in the teacher's queue
        until(lambda: backend.queued() == 0, "its places are free")
        assert ask(http).status_code == 200


def test_what_takes_too_long_ends(run):
    with api(run, teacher=True, teacher_steps=LONG, timeout_seconds=1.5) as (url, backend):
        with httpx.Client(base_url=url, timeout=60) as http:
            assert "1.5 s" in error(ask(http, model="tiny-teacher"), 408)["message"]
            until(lambda: backend.queued() == 0, "its place is free")
            said = events(ask(http, model="tiny-teacher", stream=True, step_previews=True))
            assert said[0][0] == "image_generation.step" and said[0][1]["made_by"] == "teacher"
            assert said[-1][0] == "error" and "1.5 s" in said[-1][1]["error"]["message"]
            until(lambda: backend.queued() == 0, "its place is free")
            assert figure(http, "raydmd_http_requests_total", route=GENERATIONS, status="408") == 2
            with client(url) as ai, pytest.raises(openai.APIError, match="1.5 s"):
                more = {"step_previews": True}  # else nothing is said before the time is over
                list(ai.images.generate(prompt="3", model="tiny-teacher", stream=True, extra_body=more))
            with connect(url) as half:  # a body that never comes
                half.sendall(request_bytes(GENERATIONS, {"prompt": "3"})[:-1])
                assert b" 408 " in half.recv(100)
            assert ask(http).status_code == 200


class Broken:
    """A backend that has a bug, and no replica."""

    def __init__(self, card):
        self.card = lambda: card

    async def make(self, ask: GenerationRequest) -> GenerationResult:
        raise RuntimeError("the innermost secret")

    async def watch(self, ask: GenerationRequest):
        raise Unavailable("no replica")
        yield

    async def ready(self) -> None:
        raise Unavailable("no replica")

    def queued(self) -> int:
        return 0


def test_our_own_errors_and_absence(quickly, run, caplog):
    app = make_app(Broken(quickly[1].card()), Serving(run=str(run)), frozenset())
    with server(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        found = error(ask(http), 500)
        assert found["type"] == "server_error" and "secret" not in found["message"]
        for absent in (ask(http, stream=True, partial_images=1), http.get("/health")):
            assert error(absent, 503)["message"] == "no replica" and int(absent.headers["retry-after"]) >= 1
    (record,) = [json.loads(r.message) for r in caplog.records if r.levelno >= logging.ERROR]
    assert "the innermost secret" in record["traceback"] and record["request_id"] in found["message"]


def test_the_page(http, tmp_path):
    assert http.get("/").status_code == (200 if PAGE.is_file() else 404)
    (tmp_path / "page.html").write_text("<html><style>a{}</style><script>alert('&amp;')</script></html>")
    allowed = Page(tmp_path / "page.html").headers["content-security-policy"]
    # printf %s 'a{}' | openssl dgst -sha256 -binary | base64
    assert "style-src 'sha256-X1RutGBrXCt9KkSaXMK7tHftWiRscFHOhxsS8tv8hBk='" in allowed
    assert "script-src 'sha256-eZlEP4DRzwZC02k7bmZgjC4SP8WEuuiapzGLJLDxEFc='" in allowed
    assert "default-src 'none'" in allowed and "unsafe" not in allowed
    (tmp_path / "page.html").write_text("<p>")
    assert "script-src 'none'" in Page(tmp_path / "page.html").headers["content-security-policy"]
