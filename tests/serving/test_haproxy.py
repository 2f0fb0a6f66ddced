"""HAProxy itself, with the file that Ray writes for it, and the changes that are made to it."""

import asyncio
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ports import free_ports
from ray.serve._private import haproxy as ray_haproxy
from ray.serve.config import HTTPOptions
from served import server, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from raydmd.serving.haproxy import SAID, Limits, bind_address, environment, trusted, write_haproxy
from raydmd.serving.haproxy_log import proxy_log
from raydmd.serving.haproxy_manager import WatchedHAProxy
from raydmd.serving.ports import SOCKET_PATH, short_folder

GENERATIONS = "/v1/images/generations"
USUAL = Limits()
NODE = "f" * 56  # Ray's id of a node
DENIALS = "".join(f"    http-request deny deny_status {status} if {{ path /deny/{status} }}\n" for status in SAID)


class Origin:
    """A server that is full at first, for as long as it says, for whom it says."""

    def __init__(self) -> None:
        self.hold, self.maker, self.asked, self.pause = "60000", "student", 0, 0.0
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: Request) -> Response:
        self.asked += request.url.path != "/-/healthz"  # HAProxy asks for that by itself
        await request.body()
        await asyncio.sleep(self.pause)
        if self.hold and request.method == "POST":
            full = {"x-raydmd-full": self.maker, "x-raydmd-full-ms": self.hold}
            return JSONResponse({"error": {}}, 429, {"retry-after": "7", **full})
        return JSONResponse({"path": request.url.path, "headers": dict(request.headers)})


class Proxy:
    """Ray's HAProxy in front of an address, run in a thread as Ray's actor runs it.

    Args:
        folder: of its files.
        origin: the port of what it stands in front of.
        host: where it listens.
        limits: how long it waits for clients.
    """

    def __init__(self, folder: Path, origin: int, host: str = "127.0.0.1", limits: Limits = USUAL) -> None:
        self.folder, (self.port,) = folder, free_ports(1)
        command = write_haproxy(folder, bind_address(host, self.port), limits)
        settings = environment(folder, command)
        self._command, self.config = str(command), folder / NODE / "haproxy.cfg"
        self.limit = int(settings["RAY_SERVE_HAPROXY_MAXCONN"])
        config = ray_haproxy.HAProxyConfig(
            socket_path=str(folder / NODE / "admin.sock"), server_state_base=str(folder / NODE),
            server_state_file=str(folder / NODE / "server-state"), maxconn=self.limit, nbthread=1,
            metrics_enabled=False, timeout_client_s=3600, timeout_server_s=3600,
            enable_so_reuseport=True, retry_on="conn-failure", retries=1,
            log_target=settings["RAY_SERVE_HAPROXY_LOG_TARGET"],
            http_options=HTTPOptions(host="127.0.0.1", port=self.port), is_head=True,
        )  # fmt: skip
        self.backend = ray_haproxy.BackendConfig(
            name="http-raydmd", path_prefix="/", app_name="raydmd",
            servers=[ray_haproxy.ServerConfig(name="one", host="127.0.0.1", port=origin)],
        )  # fmt: skip
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.api: Any = self.call(self._make(config))

    async def _make(self, config: Any) -> WatchedHAProxy:
        return WatchedHAProxy(config, {"http-raydmd": self.backend}, str(self.config))

    def call(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(60)

    @property
    def pid(self) -> int:
        return int(self.api._proc.pid)

    def close(self) -> None:
        self.call(self.api.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def haproxy(origin: str, host: str = "127.0.0.1", limits: Limits = USUAL) -> Iterator[tuple[httpx.Client, Proxy]]:
    """Put HAProxy in front of an address; yield a client of it."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        place = short_folder(80)
        stack.callback(shutil.rmtree, place)
        proxy = Proxy(place, int(origin.rpartition(":")[2]), host, limits)
        stack.callback(proxy.close)
        patch.setattr(ray_haproxy, "get_haproxy_binary", lambda: proxy._command)
        template = ray_haproxy.HAPROXY_CONFIG_TEMPLATE.replace("    # Routes endpoint\n", DENIALS + "    # Routes\n")
        patch.setattr(ray_haproxy, "HAPROXY_CONFIG_TEMPLATE", template)
        # without checks, which would take a while to find the server
        patch.setattr(ray_haproxy, "HAPROXY_CONFIG_TEMPLATE", template.replace("}} check", "}}"))
        proxy.call(proxy.api.start())
        reached = "[::1]" if ":" in host else "127.0.0.1"
        with httpx.Client(base_url=f"http://{reached}:{proxy.port}", timeout=30) as client:
            assert proxy.config.read_text().count("http-buffer-request") == 1  # it was changed once, and read twice
            yield client, proxy


@pytest.fixture
def origin() -> Iterator[tuple[str, Origin]]:
    made = Origin()
    with server(made.app) as url:
        yield url, made


@pytest.fixture
def proxied(origin: tuple[str, Origin]) -> Iterator[tuple[httpx.Client, Origin]]:
    url, made = origin
    with haproxy(url) as (client, _):
        yield client, made


def test_a_refusal_for_everybody_is_repeated_without_asking(proxied: tuple[httpx.Client, Origin]) -> None:
    client, origin = proxied
    first = client.post(GENERATIONS, json={})
    assert first.status_code == 429 and origin.asked == 1
    assert not any(name.startswith("x-raydmd") for name in first.headers)
    for body in ({}, {"model": "digits"}, {"model": 3}):
        again = client.post(GENERATIONS, json=body)
        assert again.status_code == 429 and again.headers["retry-after"] == "7"
        error = again.json()["error"]
        assert error["type"] == "rate_limit_error" and error["message"].endswith("try again in 7 s")
    assert origin.asked == 1
    origin.hold = ""
    assert client.post("/v1/videos", json={}).is_success and client.get(GENERATIONS).is_success
    assert client.get("/health").json()["path"] == "/health" and origin.asked == 4


@pytest.mark.parametrize(("maker", "held"), [("student", "digits"), ("teacher", "digits-teacher")])
def test_one_model_s_refusal_is_not_another_s(proxied: tuple[httpx.Client, Origin], maker: str, held: str) -> None:
    client, origin = proxied
    origin.maker = maker
    (other,) = {"digits", "digits-teacher"} - {held}
    assert client.post(GENERATIONS, json={"model": held}).status_code == 429 and origin.asked == 1
    origin.hold = ""
    assert client.post(GENERATIONS, json={"model": other, "prompt": "7"}).is_success and origin.asked == 2
    assert client.post(GENERATIONS, json={"prompt": "7", "model": held}).status_code == 429 and origin.asked == 2
    # of a body that it does not hold whole it cannot tell whose it is: the API says so
    long = client.post(GENERATIONS, json={"prompt": "x" * 40_000, "model": held})
    assert long.is_success and origin.asked == 3


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


def said(answer: httpx.Response) -> dict[str, Any]:
    """Return an answer's error, which has the API's form."""
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"type", "message", "param", "code"}
    assert error["type"] == ("server_error" if answer.status_code >= 500 else "invalid_request_error")
    return error


def raw(port: int, data: bytes, wait: float = 30.0) -> bytes:
    """Send bytes; return all that comes until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        got = b""
        while more := connection.recv(65536):
            got += more
    return got


def parsed(answer: bytes) -> httpx.Response:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    return httpx.Response(int(first.split()[1]), headers=headers, content=body)  # type: ignore[arg-type]


def test_what_it_answers_itself_has_the_api_s_form() -> None:
    (nowhere,) = free_ports(1)
    with haproxy(f"http://127.0.0.1:{nowhere}") as (client, proxy):
        for status in SAID:
            answer = client.get(f"/deny/{status}")
            assert answer.status_code == status and said(answer)["message"] == SAID[status][1]
        nobody = client.get("/health")
        assert nobody.status_code == 503 and nobody.headers["retry-after"] == "5" and said(nobody)
        garbage = raw(proxy.port, b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert parsed(garbage).status_code == 400  # in HAProxy's own words, which cannot be changed: it is no request
        proxy.backend.path_prefix = "/elsewhere"  # as before the application is deployed
        proxy.call(proxy.api.reload())
        unknown = client.get("/health")
        assert unknown.status_code == 503 and unknown.headers["retry-after"] == "5" and said(unknown)


@pytest.mark.parametrize(("host", "elsewhere"), [("127.0.0.1", False), ("0.0.0.0", True), ("::1", False), ("::", True)])
def test_it_listens_where_it_is_told_and_nowhere_else(host: str, elsewhere: bool) -> None:
    """127.0.0.2 stands for this machine's other addresses."""
    (nowhere,) = free_ports(1)
    with haproxy(f"http://127.0.0.1:{nowhere}", host) as (client, proxy):
        assert client.get("/health").status_code == 503
        listening = [c for c in psutil.Process(proxy.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.port for c in listening} == {proxy.port}  # its figures are in the folder
        sockets = [path for path in proxy.folder.rglob("*.sock") if path.is_socket()]
        assert {path.name for path in sockets} == {"admin.sock", "figures.sock", "stats.sock"}
        assert proxy.folder.stat().st_mode & 0o777 == 0o700
        if elsewhere:
            assert httpx.get(f"http://127.0.0.2:{proxy.port}/health").status_code == 503
        else:
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.2:{proxy.port}/health")


def test_idle_connections_lock_nobody_out(origin: tuple[str, Origin]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 4200
    if hard < 2 * count + 1000:
        pytest.skip(f"a process may open {hard} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    url, made = origin
    made.hold = ""
    try:
        with ExitStack() as idle, haproxy(url, limits=Limits(8.0, 1.0, 1.0)) as (client, proxy):
            opened = [idle.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 30)) for _ in range(count)]
            for each in opened[::2]:
                each.sendall(
                    b"POST /v1/images/generations HTTP/1.1\r\ncontent-length: 20\r\n\r\n{"
                )  # half of a request
            began = time.monotonic()
            assert client.get("/health").is_success and time.monotonic() - began < 5
            ends = [each.recv(10_000) for each in opened[:40]]  # until it is said, or the connection is closed
            assert all(parsed(end).status_code == 408 and said(parsed(end)) for end in ends[::2])
            assert set(ends[1::2]) == {b""}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_may_wait_longer_than_it_may_be_silent(origin: tuple[str, Origin]) -> None:
    """The limits are for clients: an answer may take its time. Between requests, an idle connection is closed."""
    url, made = origin
    made.hold, made.pause = "", 3.0
    with haproxy(url, limits=Limits(1.0, 1.0, 1.0)) as (client, proxy):
        assert client.post(GENERATIONS, json={}).is_success
        made.pause = 0.0
        with socket.create_connection(("127.0.0.1", proxy.port), 30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            got = b""
            while more := connection.recv(65536):
                got += more
        assert got.startswith(b"HTTP/1.1 200")
        # a long body that stops amid
        cut = raw(proxy.port, b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 90000\r\n\r\n" + b"x" * 50_000)
        assert parsed(cut).status_code in (400, 408) or cut == b""


def forwarded(client: httpx.Client) -> dict[str, str]:
    given = {"x-forwarded-for": "9.9.9.9", "x-forwarded-proto": "https", "forwarded": "for=9.9.9.9", "x-real-ip": "9"}
    seen = client.get("/health", headers=given).json()["headers"]
    return {name: value for name, value in seen.items() if "forward" in name or name == "x-real-ip"}


def test_forwarded_headers_are_the_proxy_s_own(origin: tuple[str, Origin], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    with haproxy(origin[0]) as (client, _):
        assert forwarded(client) == {"x-forwarded-for": "127.0.0.1"}
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.0/8, 127.0.0.1")
    with haproxy(origin[0]) as (client, _):
        assert forwarded(client)["x-forwarded-for"] == "9.9.9.9" and len(forwarded(client)) == 4
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "nginx")
    with pytest.raises(Exception, match="FORWARDED_ALLOW_IPS: 'nginx'"):
        trusted()


@pytest.mark.ray_private
def test_it_is_started_again_when_it_ends_by_itself(origin: tuple[str, Origin]) -> None:
    with haproxy(origin[0]) as (client, proxy):
        for number in range(2):
            killed = proxy.pid
            os.kill(killed, (signal.SIGKILL, signal.SIGTERM)[number])
            began = time.monotonic()
            until(lambda: answers(proxy.port), "it answers again")
            assert time.monotonic() - began < 3
            until(lambda k=killed: proxy.pid != k, "it is known")
        # a reload at the moment of its end
        killed = proxy.pid
        os.kill(killed, signal.SIGKILL)
        proxy.backend.path_prefix = "/elsewhere"
        proxy.call(proxy.api.reload())
        until(lambda: proxy.pid != killed, "it is known")
        assert client.get("/health").status_code == 503  # by the newer file
        last = proxy.pid
    assert not psutil.pid_exists(last)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").is_success
    except httpx.HTTPError:
        return False


PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.argv[1], "-db", "-f", sys.argv[2]]).pid, flush=True)
time.sleep(1000)
"""


def test_it_ends_when_its_parent_is_killed(origin: tuple[str, Origin]) -> None:
    folder = short_folder(80)
    (port,) = free_ports(1)
    command, config = write_haproxy(folder, bind_address("127.0.0.1", port)), folder / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    log global\n    option httplog\n    timeout client 5s\n    timeout server 5s\n"
        "    timeout connect 5s\nfrontend http_frontend\n    bind :1\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT, command, config], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    until(lambda: child.name() == "haproxy" and listens(port), "it listens")
    parent.kill()
    parent.wait()
    child.wait(10)
    assert not listens(port)
    shutil.rmtree(folder)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("variable", ["TMPDIR", "XDG_RUNTIME_DIR"])
def test_a_long_place_for_temporary_files_does_not_matter(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: tuple[str, Origin]
) -> None:
    long = tmp_path / ("long" * 30) / ("er" * 60)
    long.mkdir(parents=True)
    monkeypatch.setenv(variable, str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    with haproxy(origin[0]) as (client, proxy):
        assert client.get("/health").is_success and len(str(proxy.api.cfg.socket_path)) <= SOCKET_PATH


def test_what_it_answers_itself_is_logged_and_nothing_else(
    origin: tuple[str, Origin], caplog: pytest.LogCaptureFixture
) -> None:
    """The API logs what it answers; nobody else would tell of a client's 503, or of bytes that are no HTTP."""
    url, made = origin
    caplog.set_level("INFO", "raydmd.serving.haproxy")

    def told() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "raydmd.serving.haproxy"]

    with haproxy(url) as (client, proxy), proxy_log(proxy.folder):
        assert client.get("/v1/models", headers={"x-request-id": "answered"}).is_success
        assert client.post(GENERATIONS, json={}).status_code == 429  # the server's own
        assert client.post(GENERATIONS, json={}).status_code == 429 and made.asked == 2  # and its repetition
        said = client.get("/deny/503", headers={"x-request-id": 'mine"\\'})
        assert said.status_code == 503
        with socket.create_connection(("127.0.0.1", proxy.port)) as stranger:
            stranger.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            stranger.settimeout(10)
            assert b"400" in stranger.recv(4096)
        until(lambda: len(told()) >= 2, "both are logged")
    unavailable, broken = (json.loads(record.message) for record in told())
    assert (unavailable["request_id"], unavailable["route"], unavailable["status"]) == ('mine"\\', "/deny/503", 503)
    assert (unavailable["client"], unavailable["method"], unavailable["by"]) == ("127.0.0.1", "GET", "haproxy")
    assert broken["status"] == 400 and "request_id" not in broken
    assert [record.levelname for record in told()] == ["WARNING", "INFO"]
