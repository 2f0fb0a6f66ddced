"""The metadata servers of AWS, GCP and Azure: what each says of taking this machine away. Standard library alone."""

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

LINK_LOCAL = "http://169.254.169.254"  # all three clouds' metadata servers; no look-up of a name that may fail
TIMEOUT = 5.0  # seconds for a request
LONG_POLL = 10  # seconds; the GCP maintenance event is looked at between two long polls
TOKEN_LIFE = 21600  # seconds, the most that AWS gives


class MetadataError(Exception):
    """The metadata server is away, refuses, or answers what its cloud never does: worth another try."""


@dataclass(frozen=True)
class Notice:
    """A notice: ``name`` tells it from the cloud's others, ``deadline`` is in seconds since the epoch."""

    cloud: str
    kind: str
    name: str
    deadline: float


@dataclass
class Source:
    """A cloud's metadata server at ``url``."""

    url: str
    rebalance_deadline: float | None = 120.0  # AWS alone; None ignores the recommendation

    def ask(self, method: str, path: str, headers: dict[str, str], timeout: float = TIMEOUT) -> tuple[int, str, Any]:
        """Return status, text and headers. Unlike urllib, this knows of no proxy and follows no redirection."""
        at = urlsplit(self.url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=timeout)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(2**20).decode(errors="replace"), answer.headers
        except (OSError, http.client.HTTPException) as error:
            raise MetadataError(f"{self.url} cannot be reached: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def unexpected(self, path: str, what: object) -> NoReturn:
        """Raise a MetadataError that names the path and ``what`` it answered."""
        raise MetadataError(f"{self.url}{path} answered {str(what)[:200]!r}")

    def greet(self) -> None:
        """Raise a MetadataError unless this cloud's server answers."""
        raise NotImplementedError

    def notices(self, wait: bool) -> Iterator[Notice]:
        """Yield the notices that stand, the most urgent first; where the server can, ``wait`` for a change.

        A MetadataError may come after some of them.
        """
        try:
            yield from self.poll(wait)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise MetadataError(f"{self.url} answered what was not expected: {error!r}") from error

    def poll(self, wait: bool) -> Iterator[Notice]:
        """Do what ``notices`` says; an answer of another form may raise what it raises."""
        raise NotImplementedError


@dataclass
class Aws(Source):
    """The instance metadata service, version 2."""

    token: str = ""
    renew_at: float = 0.0

    def greet(self) -> None:
        """Take a new token."""
        path = "/latest/api/token"
        status, text, _ = self.ask("PUT", path, {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFE)})
        if status != 200:
            self.unexpected(path, status)
        self.token, self.renew_at = text.strip(), time.monotonic() + 0.9 * TOKEN_LIFE

    def read(self, path: str) -> dict[str, str] | None:
        """Return the JSON at ``path``, or None where there is none."""
        if not self.token or time.monotonic() > self.renew_at:
            self.greet()
        status, text, _ = self.ask("GET", path, {"X-aws-ec2-metadata-token": self.token})
        if status == 401:
            self.greet()
            status, text, _ = self.ask("GET", path, {"X-aws-ec2-metadata-token": self.token})
        if status == 404:
            return None
        return json.loads(text) if status == 200 else self.unexpected(path, status)

    def poll(self, wait: bool) -> Iterator[Notice]:
        """Yield the interruption, then the rebalance recommendation."""
        found = self.read("/latest/meta-data/spot/instance-action")
        if found is not None:
            deadline = datetime.fromisoformat(found["time"]).timestamp()
            yield Notice("aws", found["action"], f"{found['action']} {found['time']}", deadline)
        if self.rebalance_deadline is None:
            return
        found = self.read("/latest/meta-data/events/recommendations/rebalance")
        if found is not None:
            name = f"rebalance {found['noticeTime']}"
            yield Notice("aws", "rebalance", name, time.time() + self.rebalance_deadline)


@dataclass
class Gcp(Source):
    """The metadata server of Compute Engine."""

    etag: str = ""

    def read(self, key: str, query: str = "", timeout: float = TIMEOUT) -> tuple[str, str]:
        """Return an instance's value and its ETag."""
        path = f"/computeMetadata/v1/instance/{key}{query}"
        status, text, headers = self.ask("GET", path, {"Metadata-Flavor": "Google"}, timeout)
        if status != 200:
            self.unexpected(path, status)
        if headers.get("Metadata-Flavor") != "Google":
            self.unexpected(path, "no header Metadata-Flavor: Google")
        return text.strip(), headers.get("ETag", "")

    def greet(self) -> None:
        """Read the value that is watched."""
        self.read("preempted")

    def poll(self, wait: bool) -> Iterator[Notice]:
        """Yield the preemption, waiting for it from the second call on, then the maintenance that stops the VM."""
        query = f"?wait_for_change=true&timeout_sec={LONG_POLL}&last_etag={quote(self.etag)}"
        if wait and self.etag:
            preempted, self.etag = self.read("preempted", query, LONG_POLL + TIMEOUT)
        else:
            preempted, self.etag = self.read("preempted")
        if preempted not in ("TRUE", "FALSE"):
            self.unexpected("/computeMetadata/v1/instance/preempted", preempted)
        if preempted == "TRUE":
            yield Notice("gcp", "preempted", "preempted", time.time() + 30)
        if self.read("maintenance-event")[0] == "TERMINATE_ON_HOST_MAINTENANCE":
            yield Notice("gcp", "maintenance", "maintenance", time.time() + 60)


@dataclass
class Azure(Source):
    """The scheduled events of the instance metadata service."""

    vm: str = ""

    def read(self, path: str) -> str:
        """Return the text at ``path``."""
        status, text, _ = self.ask("GET", path, {"Metadata": "true"})
        return text if status == 200 else self.unexpected(path, status)

    def greet(self) -> None:
        """Read this VM's name."""
        self.vm = self.read("/metadata/instance/compute/name?api-version=2021-02-01&format=text").strip()

    def poll(self, wait: bool) -> Iterator[Notice]:
        """Yield the events that take this VM away. The first call switches them on and may take minutes: it fails."""
        if not self.vm:
            self.greet()
        for event in json.loads(self.read("/metadata/scheduledevents?api-version=2020-07-01"))["Events"]:
            mine = self.vm.casefold() in [name.casefold() for name in event["Resources"]]
            if mine and event["EventType"] in ("Preempt", "Terminate", "Redeploy", "Reboot"):
                starts = event["NotBefore"]
                deadline = parsedate_to_datetime(starts).timestamp() if starts else time.time()
                yield Notice("azure", event["EventType"].lower(), event["EventId"], deadline)


SOURCES: dict[str, type[Source]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def discover(url: str, rebalance_deadline: float | None) -> Source:
    """Return the cloud whose metadata server answers at ``url``; a MetadataError when none does."""
    failures = []
    for kind in SOURCES.values():
        source = kind(url, rebalance_deadline)
        try:
            source.greet()
            return source
        except MetadataError as error:
            failures.append(str(error))
    raise MetadataError(f"no cloud's metadata server found: {'; '.join(failures)}")
