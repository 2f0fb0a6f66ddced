"""Headers that Ray Serve obeys are taken out before it sees them."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from raydmd.serving.http.headers import middlewares


async def echo(request: Request) -> Response:
    """Say what came; answer with two request ids, as Serve's own middleware makes them."""
    seen = [[name.decode(), value.decode("latin-1")] for name, value in request.headers.raw]
    answer = JSONResponse(seen)
    answer.raw_headers += [(b"x-request-id", b"first"), (b"X-Request-ID", b"second"), (b"set-cookie", b"1")] * 2
    return answer


def ask(given: list[tuple[bytes, bytes]]) -> tuple[list[list[str]], httpx.Response]:
    import asyncio

    async def drive() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=[Route("/", echo)], middleware=middlewares()))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get("/", headers=given)

    answer = asyncio.run(drive())
    return answer.json(), answer


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-timeout-seconds", b"X-Session-ID", b"x_session_id", b"serve_multiplexed_model_id",
        b"Serve-Multiplexed-Model-Id", b"x-request-disconnect-disabled",
    ],
)  # fmt: skip
def test_what_serve_obeys_does_not_reach_it(name: bytes) -> None:
    seen, _ = ask([(name, b"\xff"), (b"authorization", b"Bearer key"), (b"x-other", b"\xff")])
    kept = dict(map(tuple, seen))
    assert kept["authorization"] == "Bearer key" and kept["x-other"] == "\xff"
    assert name.lower().decode() not in kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [([b"req-1"], ["req-1"]), ([b"\xff"], []), ([b"\xff", b"a", b"b"], ["a"]), ([b"x" * 129], []), ([], [])],
)
def test_a_request_has_one_id_or_none(given: list[bytes], kept: list[str]) -> None:
    seen, answer = ask([(b"x-request-id", value) for value in given])
    assert [value for name, value in seen if name == "x-request-id"] == kept
    assert answer.headers.get_list("x-request-id") == ["first"]
    assert answer.headers.get_list("set-cookie") == ["1", "1"]  # others may come twice
