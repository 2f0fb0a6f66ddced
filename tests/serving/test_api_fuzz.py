"""Nothing that a client sends is the server's error, and nothing harms a neighbour."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import make_run
from served import api, connect, request_bytes

from raydmd.serving.http import make_app
from raydmd.serving.http.schemas import ImageBody
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import parse_serving

GENERATIONS = "/v1/images/generations"
ROUTES = [
    GENERATIONS, "/v1/videos", "/v1/videos/video_1", "/v1/videos/video_1/content", "/v1/files/x.png", "/v1/models",
    "/v1/models/tiny", "/health", "/metrics", "/", "/docs", "/docs/docs.js", "/openapi.json",
]  # fmt: skip
GOOD = b'{"prompt": "3", "seed": 1}'
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def run(quick, prompts, tmp_path_factory):
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "run", prompts("digits")).folder


class Caller:
    """Calls the app in one loop, each time beside a neighbour that asks for what is right."""

    def __init__(self, run, runner):
        serving = parse_serving({"run": str(run), "name": "tiny", "limits": {"n": 2, "body_bytes": 20000}}, "test")
        backend = local_pipeline(serving)
        self.app, self.keyed = (make_app(backend, serving, keys) for keys in (frozenset(), frozenset({"key"})))
        self.runner, self.backend = runner, backend
        self.good = self.picture(self.one(GOOD))

    def one(self, body, **request):
        return self.runner.run(self._send(self.app, body, **request))

    def picture(self, answer):
        assert answer[0] == 200
        return json.loads(answer[2])["data"]

    def __call__(self, body, **request):
        """Return status, headers and body of the answer, which is none of the server's errors."""

        async def both():
            return await asyncio.gather(self._send(self.app, body, **request), self._send(self.app, GOOD))

        answer, neighbour = self.runner.run(both())
        assert self.picture(neighbour) == self.good
        self._sound(answer)
        keyed = self.runner.run(self._send(self.keyed, body, **request))
        self._sound(keyed)
        assert self.backend.queued() == 0
        return answer

    @staticmethod
    def _sound(answer):
        status, headers, body = answer
        assert 200 <= status < 500, body
        assert all("\n" not in value and "\r" not in value for value in headers.values())
        if status >= 400:
            assert set(json.loads(body)) == {"error"} and set(json.loads(body)["error"]) == {
                "type", "message", "param", "code"
            } and len(body) < 4000  # fmt: skip

    async def _send(self, app, body, method="POST", path=GENERATIONS, query=b"", headers=None):
        head, parts = {}, []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if waiting:
                return waiting.pop()
            await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.start":
                head.update(message)
            else:
                parts.append(message.get("body", b""))

        scope = {
            "type": "http", "method": method, "path": path, "query_string": query, "root_path": "", "scheme": "http",
            "headers": headers or [(b"content-type", b"application/json")], "server": ("::1", 80), "client": None,
        }  # fmt: skip
        await app(scope, receive, send)
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in head["headers"]}
        return head["status"], named, b"".join(parts)


@pytest.fixture(scope="module")
def call(run):
    with asyncio.Runner() as runner:
        yield Caller(run, runner)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["3", "7", "tiny", "8x8", "auto", "png", "url", "\0", "٣", "3" * 5000, 2**63, -1, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.dictionaries(st.sampled_from(sorted(ImageBody.model_fields)) | st.text(max_size=8), VALUES, max_size=6)
RIGHT = st.fixed_dictionaries({"prompt": st.sampled_from("0123456789")})


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(call, body):
    assert call(body)[0] == 400


@FUZZ
@given(FIELDS)
def test_any_fields(call, fields):
    call(json.dumps(fields).encode())


@FUZZ
@given(RIGHT, st.sampled_from(sorted(set(ImageBody.model_fields) - {"prompt"})), VALUES)
def test_one_field_of_any_value(call, right, field, value):
    call(json.dumps({**right, field: value}).encode())


@FUZZ
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE", "X"]),
    st.sampled_from(ROUTES) | st.text(max_size=30).map(lambda text: f"/{text}"),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from([b"content-type", b"host", b"range", b"authorization", b"x-request-id", b"content-length"]),
        st.binary(max_size=60), max_size=4,
    ),
)  # fmt: skip
def test_any_route_and_headers(call, method, path, query, headers):
    status = call(b"{}", method=method, path=path, query=query, headers=[*headers.items()])[0]
    assert status != 200 or method in ("GET", "HEAD")


DEEP = 9000
NASTY = {
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "a deep field": b'{"prompt": "3", "quality": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "a long number": b'{"prompt": "3", "seed": ' + b"9" * 15000 + b"}",
    "many pictures": b'{"prompt": "3", "n": ' + b"9" * 15000 + b"}",
    "not a number": b'{"prompt": "3", "n": NaN}',
    "infinite": b'{"prompt": "3", "seed": 1e999}',
    "a half surrogate": b'{"prompt": "\\ud800"}',
    "a half surrogate as field": b'{"prompt": "3", "\\udfff": 1}',
    "a zero": b'{"prompt": "3\\u0000"}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "3"}'.encode("utf-16"),
    "a mark before": b'\xef\xbb\xbf{"prompt": "3"}',
    "another digit": '{"prompt": "٣"}'.encode(),
    "many unknown fields": json.dumps({f"f{i}": i for i in range(1000)}).encode(),
    "a long unknown field": json.dumps({"f" * 15000: 1}).encode(),
    "a long size": json.dumps({"prompt": "3", "size": "9" * 9000 + "x1"}).encode(),
    "a size in other digits": json.dumps({"prompt": "3", "size": "٨x٨"}).encode(),
    "a long model": json.dumps({"prompt": "3", "model": "m" * 15000}).encode(),
    "lines": json.dumps({"prompt": "3\r\nx: y", "model": "tiny\r\nx: y"}).encode(),
    "nothing": b"",
    "null": b"null",
}


@pytest.mark.parametrize("name", NASTY)
def test_hand_picked(call, name):
    status = call(NASTY[name])[0]
    assert status in (400, 404)
    if len(NASTY[name]) < 10000:
        assert call(NASTY[name], headers=[(b"content-type", b"text/plain")])[0] == 415


def test_harmless_oddities_are_let_pass(call):
    for fields in (
        {"user": "\0"}, {"quality": None, "n": None, "seed": None, "size": None}, {"seed": 2**63 - 1}, {"seed": 0},
    ):  # fmt: skip
        assert call(json.dumps({"prompt": "3", **fields}).encode())[0] == 200
    assert call(b'{"prompt": "5", "prompt": "3", "seed": 1}')[0] == 200
    assert call(b" " * 9000 + GOOD)[0] == 200
    json_type = [(b"content-type", b'APPLICATION/JSON; charset="x')]
    assert call(GOOD, headers=json_type)[0] == 200
    assert call(GOOD, headers=[*json_type, (b"content-length", b"9" * 5000)])[0] == 413


def test_over_the_wire(run):
    """What the server's own parser sees, too: each on a connection of its own, while another client is served."""
    good = request_bytes(GENERATIONS, {"prompt": "3", "seed": 1}).replace(b"host: x", b"host: x\r\nconnection: close")
    chunked = b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = {
        good: 200,
        good.replace(b"host: x", b"host: \xff\xfe"): 200,
        good.replace(b"host: x", b"host: [::1"): 200,
        good.replace(b"application", b"\xff"): 415,
        good.replace(b"host: x", b"host: x\r\ntransfer-encoding: chunked"): 400,  # and a length
        b"GET /%ff%00 HTTP/1.1\r\nconnection: close\r\n\r\n": 404,
        b"GET /nowhere HTTP/1.1\r\nhost: <>\r\nconnection: close\r\n\r\n": 404,
        b"GET\r\n\r\n": 400,
        b"\x16\x03\x01\x02\x00\r\n\r\n": 400,
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n": 400,
        chunked + b"zz\r\n": 400,
    }
    cut = [chunked, chunked + b"5\r\nab", good[:-3], b"GET /health HTTP/1.1\r\nhost: " + b"a" * 70000]

    def told(url, sent, end):
        with connect(url) as wire:
            wire.sendall(sent)
            if end:
                wire.shutdown(1)  # what is not whole by now will never be
            answer = b""
            while more := wire.recv(65536):
                answer += more
            return answer

    with api(run) as (url, backend), httpx.Client(base_url=url, timeout=60) as http:
        first = http.post(GENERATIONS, json={"prompt": "3", "seed": 1}).json()["data"]
        for sent, status in whole.items():
            assert told(url, sent, end=False).startswith(f"HTTP/1.1 {status} ".encode()), sent[:80]
            assert http.post(GENERATIONS, json={"prompt": "3", "seed": 1}).json()["data"] == first
        for sent in cut:
            assert not told(url, sent, end=True).startswith((b"HTTP/1.1 2", b"HTTP/1.1 5")), sent[:80]
            assert http.post(GENERATIONS, json={"prompt": "3", "seed": 1}).json()["data"] == first
        assert backend.queued() == 0
        assert 'status="500"' not in http.get("/metrics").text and 'status="200"' in http.get("/metrics").text
