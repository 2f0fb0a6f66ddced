"""HAProxy itself, with the file that Ray writes for it cut down to its frame, and the changes that are made to it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from ports import free_ports
from served import server, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from raydmd.serving.haproxy import write_haproxy

GENERATIONS = "/v1/images/generations"
CONFIG = """global
    log 127.0.0.1:514 local0 info
defaults
    mode http
    retries 0
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    log global
    errorfile 500 {folder}/none.http
    option httplog
frontend http_frontend
    bind {address}
    log global
    use_backend http-raydmd
backend http-raydmd
    log global
    server one {origin}
"""


class Origin:
    """A server that is full at first, for as long as it says."""

    def __init__(self) -> None:
        self.hold, self.asked = "60000", 0
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: Request) -> Response:
        self.asked += 1
        if self.hold and request.method == "POST":
            return JSONResponse({"error": {}}, 429, {"retry-after": "7", "x-raydmd-full": self.hold})
        return JSONResponse({"path": request.url.path, "watched": request.headers.get("x-request-disconnect-disabled")})


@contextmanager
def haproxy(folder: Path, origin: str) -> Iterator[httpx.Client]:
    """Put HAProxy in front of an address; yield a client of it."""
    command, config, (port,) = write_haproxy(folder), folder / "ray.cfg", free_ports(1)
    config.write_text(CONFIG.format(folder=folder, address=f"127.0.0.1:{port}", origin=origin))
    checked = subprocess.run([command, "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([command, "-db", "-f", config], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            until(lambda: listens(client), "HAProxy listens")
            assert config.read_text().count("http-buffer-request") == 1  # it was changed once, and read twice
            yield client
    finally:
        process.terminate()
        process.wait(120)


def listens(client: httpx.Client) -> bool:
    try:
        return bool(client.get("/").status_code)
    except httpx.ConnectError:
        return False


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[httpx.Client, Origin]]:
    origin = Origin()
    with server(origin.app) as url, haproxy(tmp_path, url.removeprefix("http://")) as client:
        origin.asked = 0
        yield client, origin


def test_a_refusal_for_everybody_is_repeated_without_asking(proxied: tuple[httpx.Client, Origin]) -> None:
    client, origin = proxied
    first = client.post(GENERATIONS, json={})
    assert first.status_code == 429 and origin.asked == 1 and "x-raydmd-full" not in first.headers
    for _ in range(3):
        again = client.post(GENERATIONS, json={})
        assert again.status_code == 429 and again.headers["retry-after"] == "7"
        error = again.json()["error"]
        assert error["type"] == "rate_limit_error" and error["message"].endswith("try again in 7 s")
    assert origin.asked == 1
    origin.hold = ""
    assert client.post("/v1/videos", json={}).is_success and client.get(GENERATIONS).is_success
    assert client.get("/health").json() == {"path": "/health", "watched": "?1"} and origin.asked == 4


def test_it_ends_by_itself(proxied: tuple[httpx.Client, Origin]) -> None:
    client, origin = proxied
    origin.hold = "200"
    assert client.post(GENERATIONS, json={}).status_code == 429
    origin.hold = ""
    until(lambda: client.post(GENERATIONS, json={}).is_success, "it lets in again")


def test_a_refusal_of_one_request_alone_is_not(proxied: tuple[httpx.Client, Origin]) -> None:
    client, origin = proxied
    origin.hold = "0"
    assert [client.post(GENERATIONS, json={}).status_code for _ in range(3)] == [429] * 3 and origin.asked == 3


def test_nobody_there_is_said_as_it_is(tmp_path: Path) -> None:
    with haproxy(tmp_path, f"127.0.0.1:{free_ports(1)[0]}") as client:
        said = client.get("/health")
        assert said.status_code == 503 and said.headers["retry-after"] == "5"
        assert said.json()["error"]["type"] == "server_error"
