"""HAProxy itself, with the file that Ray writes for it cut down to its frame, and the changes that are made to it."""

import re
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

FIGURES = ("frontend prometheus", "listen stats")
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
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    no log
frontend http_frontend
    bind {host}:{port}
    log global
    use_backend http-raydmd
backend http-raydmd
    log global
    server one {origin}
listen stats
  bind *:{stats}
  stats enable
  stats uri /stats
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
        return JSONResponse({"path": request.url.path})


@contextmanager
def haproxy(folder: Path, origin: str, host: str = "127.0.0.1") -> Iterator[httpx.Client]:
    """Put HAProxy in front of an address; yield a client of it."""
    command, config, (port, metrics, stats) = write_haproxy(folder), folder / "ray.cfg", free_ports(3)
    config.write_text(CONFIG.format(folder=folder, host=host, port=port, metrics=metrics, stats=stats, origin=origin))
    checked = subprocess.run([command, "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([command, "-db", "-f", config], stderr=subprocess.DEVNULL)
    try:
        reached = "[::1]" if host == "::1" else "127.0.0.1"
        with httpx.Client(base_url=f"http://{reached}:{port}", timeout=30) as client:
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
    assert client.get("/health").json() == {"path": "/health"} and origin.asked == 4


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


@pytest.mark.parametrize(("host", "elsewhere"), [("127.0.0.1", False), ("*", True), ("::1", False)])
def test_it_listens_where_it_is_told_and_its_figures_on_loopback_only(
    host: str, elsewhere: bool, tmp_path: Path
) -> None:
    """127.0.0.2 stands for this machine's other addresses."""
    with haproxy(tmp_path, f"127.0.0.1:{free_ports(1)[0]}", host) as client:
        said = (tmp_path / "ray.cfg").read_text()
        metrics, stats = (int(re.search(rf"{name}\n +bind .*:(\d+)$", said, re.MULTILINE)[1]) for name in FIGURES)
        assert httpx.get(f"http://127.0.0.1:{metrics}/metrics").is_success
        assert httpx.get(f"http://127.0.0.1:{stats}/stats").is_success
        for port in (metrics, stats):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.2:{port}/")
        if elsewhere:
            assert httpx.get(f"http://127.0.0.2:{client.base_url.port}/health").status_code == 503
        else:
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.2:{client.base_url.port}/health")
