"""Metadata servers on loopback that speak the three clouds' paths, methods and headers, and refuse what they refuse."""

import json
import socket
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, str] | tuple[int, str, dict[str, str]]


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Return the condition's first true value; an AssertionError after ``seconds``."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not so in time"
        time.sleep(0.02)
    return found


class Handler(BaseHTTPRequestHandler):
    server: "Metadata"

    def respond(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.asked.append((self.command, url.path, query))
        status, text, *headers = self.server.failure or self.server.answer(self.command, url.path, query, self.headers)
        self.server.answered.append((url.path, status))
        self.send_response(status)
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = respond

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Metadata(ThreadingHTTPServer):
    """A server that answers as its subclass does, or with ``failure``; a context that serves."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.answered: list[tuple[str, int]] = []
        self.failure: Answer | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message) -> Answer:
        raise NotImplementedError

    def wait_for(self, path: str, status: int, more: int = 3) -> None:
        """Wait until ``path`` was answered with ``status`` that many times more."""
        before = self.answered.count((path, status))
        wait_until(lambda: self.answered.count((path, status)) >= before + more)

    def __enter__(self) -> "Metadata":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class AwsMetadata(Metadata):
    """Version 2 alone: every read needs a token that was given and has not expired."""

    TOKEN = "/latest/api/token"
    ACTION = "/latest/meta-data/spot/instance-action"
    REBALANCE = "/latest/meta-data/events/recommendations/rebalance"

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.tokens: set[str] = set()
        self.given = 0
        self.found: dict[str, Any] = {}

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message) -> Answer:
        if method == "PUT":
            if path != self.TOKEN:
                return 405, ""
            if not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
                return 400, ""
            self.given += 1
            self.tokens.add(f"token-{self.given}")
            return 200, f"token-{self.given}"
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, ""
        found = self.found.get(path)
        return (404, "") if found is None else (200, found if isinstance(found, str) else json.dumps(found))


class GcpMetadata(Metadata):
    """Values under ``instance/`` with ETags; ``wait_for_change`` holds the request."""

    PREEMPTED = "/computeMetadata/v1/instance/preempted"
    MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"

    def __init__(self, port: int = 0, flavor: str = "Google") -> None:
        super().__init__(port)
        self.flavor = flavor
        self.values = {self.PREEMPTED: "FALSE", self.MAINTENANCE: "NONE"}
        self.changed = threading.Condition()
        self.held = 0

    def set(self, path: str, value: str) -> None:
        with self.changed:
            self.values[path] = value
            self.changed.notify_all()

    def etag(self, path: str) -> str:
        return f"{sum(self.values[path].encode()):016x}"

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message) -> Answer:
        if headers.get("Metadata-Flavor") != "Google":
            return 403, "Missing Metadata-Flavor:Google header."
        if method != "GET":
            return 405, ""
        if path not in self.values:
            return 404, ""
        with self.changed:
            if query.get("wait_for_change") == "true":
                last = query.get("last_etag", self.etag(path))
                self.held += 1
                self.changed.wait_for(lambda: self.etag(path) != last, float(query["timeout_sec"]))
                self.held -= 1
            return 200, self.values[path], {"Metadata-Flavor": self.flavor, "ETag": self.etag(path)}


class AzureMetadata(Metadata):
    """Scheduled events of a scale set whose VM ``pool_1`` this is."""

    EVENTS = "/metadata/scheduledevents"
    NAME = "/metadata/instance/compute/name"

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.events: list[dict[str, Any]] = []

    def add(self, kind: str, vm: str, not_before: str) -> None:
        self.events.append({
            "EventId": f"event-{len(self.events)}", "EventStatus": "Scheduled" if not_before else "Started",
            "EventType": kind, "ResourceType": "VirtualMachine", "Resources": [vm, "pool_7"], "NotBefore": not_before,
            "Description": "", "EventSource": "Platform", "DurationInSeconds": -1,
        })  # fmt: skip

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message) -> Answer:
        if headers.get("Metadata") != "true":
            return 400, '{"error": "Bad request. Required metadata header not specified"}'
        if method != "GET":
            return 405, ""
        if path == self.NAME and query == {"api-version": "2021-02-01", "format": "text"}:
            return 200, "pool_1"
        if path == self.EVENTS and query == {"api-version": "2020-07-01"}:
            return 200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})
        return (400, "") if path in (self.NAME, self.EVENTS) else (404, "")


class Forwarder:
    """Passes TCP connections from ``port`` of loopback on to ``target`` (HOST:PORT) from ``open`` on."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self.target = (host, int(port))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.server: socket.socket | None = None

    def open(self) -> None:
        self.server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=(self.server,), daemon=True).start()

    def accept(self, server: socket.socket) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self.copy, args=(one, other), daemon=True).start()

    def copy(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        if self.server:
            self.server.shutdown(socket.SHUT_RDWR)
            self.server.close()
