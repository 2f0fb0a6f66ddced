"""What can be loaded: a server over HTTP, or a run in this process."""

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from raydmd.bench.arrivals import Request
from raydmd.bench.load import Answer
from raydmd.errors import UserError, nearest
from raydmd.serving.contract import Backend, BadRequest, GenerationRequest, Maker, NotFinite, Overloaded, Unavailable

REJECTIONS = frozenset({429, 503})
STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")  # of PNG, JPEG and WebP files
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """What a server says of itself: the model to ask for, and the only prompts that it knows, if it says so."""

    model: str | None
    prompts: tuple[str, ...] | None


class HttpTarget:
    """A server with ``POST /v1/images/generations``, as OpenAI's images API has it; use it in ``async with``.

    Connections are kept alive and not limited in number.

    Args:
        url: of the server, with or without ``/v1``.
        model: to ask for; None: the first that the server names.
        timeout: seconds for one request.
        key: sent as a bearer token.
        extra: further fields of a request's body; None takes a field out.

    Raises:
        UserError: ``url`` is none.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        timeout: float = 300.0,
        key: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--url {url}: http://HOST:PORT is needed")
        self.base = url.rstrip("/").removesuffix("/v1")
        self.model, self.timeout, self.extra = model, timeout, dict(extra or {})
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def look(self) -> Served:
        """Ask what is served, and take the first model if none is named.

        Raises:
            UserError: there is no server, it wants a key, or it does not know the model.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=min(PROBE_SECONDS, self.timeout))
            async with self._session.get(f"{self.base}/v1/models", timeout=timeout) as response:
                if response.status in (401, 403):
                    raise UserError(f"--url {self.base}: it asks for an API key (HTTP {response.status}): "
                                    f"--api-key-env NAME")  # fmt: skip
                listed = (await response.json(content_type=None)) if response.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UserError(f"--url {self.base}: no server answers there ({type(error).__name__})") from None
        except ValueError:
            listed = {}
        rows = listed.get("data", []) if isinstance(listed, dict) else []
        models = {str(row["id"]): row for row in rows if isinstance(row, dict) and "id" in row}
        if self.model is None:
            self.model = next(iter(models), None)
        elif models and self.model not in models:
            raise UserError(f"--model {self.model}: {self.base} has no such model{nearest(self.model, models)}")
        own = models.get(self.model or "", {}).get("raydmd")
        known = own.get("prompts") if isinstance(own, dict) else None
        return Served(self.model, tuple(str(prompt) for prompt in known) if known else None)

    def body(self, request: Request) -> dict[str, Any]:
        """Return a request's JSON."""
        body: dict[str, Any] = {"prompt": request.prompt, "n": request.n, "seed": request.seed,
                                "response_format": "b64_json"}  # fmt: skip
        if self.model is not None:
            body["model"] = self.model
        if request.size is not None:
            body["size"] = f"{request.size[0]}x{request.size[1]}"
        return {key: value for key, value in {**body, **self.extra}.items() if value is not None}

    async def ask(self, request: Request) -> Answer:
        """Send a request; see `load.Target.ask`."""
        try:
            url = f"{self.base}/v1/images/generations"
            async with self._session.post(url, json=self.body(request)) as response:
                if response.status != 200:
                    why = _reason(await response.read())
                    kind = "rejected" if response.status in REJECTIONS else "failed"
                    return Answer(kind, f"HTTP {response.status}", why=why)  # type: ignore[arg-type]
                return read_answer(await response.json(content_type=None), request.n)
        except TimeoutError:
            return Answer("failed", "timeout")
        except (aiohttp.ClientError, OSError) as error:
            return Answer("failed", type(error).__name__, why=str(error))
        except ValueError:
            return Answer("failed", "no JSON")


def _reason(body: bytes) -> str:
    """Return what an OpenAI-shaped error says; nothing if it is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def read_answer(answer: Any, n: int) -> Answer:
    """Return what a server's JSON holds; a failure if it is not ``n`` pictures."""
    try:
        files = [base64.b64decode(row["b64_json"], validate=True) for row in answer["data"]]
    except (KeyError, TypeError, binascii.Error):
        return Answer("failed", "no pictures in base64")
    if problem := _problem(files, n):
        return Answer("failed", problem)
    milliseconds, batches = answer.get("timings"), answer.get("batches")
    return Answer(
        "ok",
        pictures=len(files),
        seconds={k: v / 1e3 for k, v in _numbers(milliseconds).items()},
        batches=_numbers(batches),
    )


def _problem(files: list[bytes] | tuple[bytes, ...], n: int) -> str:
    if len(files) != n:
        return f"{len(files)} pictures instead of {n}"
    return "" if all(file.startswith(STARTS) for file in files) else "no picture"


def _numbers(values: Any) -> dict[str, float]:
    """Return what is a number of a JSON object; other servers may say other things under the same name."""
    if not isinstance(values, dict):
        return {}
    return {str(k): float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class LocalTarget:
    """A backend in this process: what the network alone can do, without HTTP and without Ray.

    Args:
        backend: makes the pictures.
        maker: student or teacher.
        timeout: seconds for one request.
    """

    def __init__(self, backend: Backend, maker: Maker = "student", timeout: float = 300.0) -> None:
        self.backend, self.maker, self.timeout = backend, maker, timeout

    async def ask(self, request: Request) -> Answer:
        """Make pictures; see `load.Target.ask`."""
        began = time.perf_counter()
        generation_request = GenerationRequest(request.prompt, request.n, request.seed, self.maker, request.size)
        try:
            async with asyncio.timeout(self.timeout):  # `wait_for` would lose a cancellation that meets the answer
                result = await self.backend.make(generation_request)
        except Overloaded:
            return Answer("rejected", "Overloaded")
        except TimeoutError:
            return Answer("failed", "timeout")
        except (BadRequest, NotFinite, Unavailable) as error:
            return Answer("failed", type(error).__name__, why=str(error))
        if problem := _problem(result.pictures, request.n):
            return Answer("failed", problem)
        seconds = {"total": time.perf_counter() - began, **result.seconds}
        return Answer("ok", pictures=len(result.pictures), seconds=seconds, batches=dict(result.batches))
