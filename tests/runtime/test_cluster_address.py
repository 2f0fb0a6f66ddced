"""RAY_ADDRESS: what cannot be joined is refused in a line and within seconds; no Ray is started."""

import ast
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from raydmd.errors import UserError
from raydmd.runtime import cluster_address
from raydmd.runtime.cluster import join_or_start
from raydmd.runtime.recovery.ray_health import RayHealthMonitor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never says a word, as behind a firewall or of another service."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def full() -> Iterator[str]:
    """An address whose queue of connections is full: the next SYN is dropped."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for filler in fillers:
            filler.close()


def refused(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    assert not ray.is_initialized()
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        join_or_start(1, 100)
    assert time.monotonic() - began < 15 and not ray.is_initialized()
    line = str(caught.value)
    assert line.startswith(f"RAY_ADDRESS {address}: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://127.0.0.1:10001", "HOST:PORT"),
        ("http://127.0.0.1:8265", "HOST:PORT"),
        ("no-such-host.invalid:6379", "no Ray cluster answers"),
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("head", "Invalid address format: head"),
        ("127.0.0.1:", "Invalid address format"),
    ],
)
def test_an_address_that_is_none(address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words in refused(address, monkeypatch)


def test_one_that_is_silent(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "silent" in refused(silent, monkeypatch)


def test_one_that_swallows_connections(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no Ray cluster answers" in refused(full, monkeypatch)


@pytest.mark.parametrize("address", ["", " ", "local", None])
def test_none_is_named(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() is None


def imports(file: Path) -> list[str]:
    """The modules that a file imports at its top level, in order."""
    found: list[str] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_benchmarks_keep_their_ray_to_loopback(file: Path) -> None:
    """Ray decides where it listens when it is imported: `raydmd.runtime` has to come first."""
    names = imports(file)
    rays = [index for index, name in enumerate(names) if name.split(".")[0] == "ray"]
    assert not rays or "raydmd.runtime" in names[: rays[0]]


def test_a_cluster_that_was_joined_is_asked_whether_it_is_there() -> None:
    """Its control store takes connections no more: within 15 s that is an error that names it."""
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = {"raylet": there.getsockname(), "control store (GCS)": gone.getsockname()}
        monitor = RayHealthMonitor(ports)
        assert monitor.error() is None
        monitor.start()
        gone.close()
        monitor.join(15)
        assert not monitor.is_alive()
        line = str(monitor.error())
        assert f"control store (GCS) at 127.0.0.1:{ports['control store (GCS)'][1]}" in line and "raylet" not in line
