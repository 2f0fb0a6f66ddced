"""A small server of real PNGs behind the images API, in a thread, to send requests to."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from PIL import Image

KEY = "a-key"


def png(shade: int, size: tuple[int, int] = (8, 8)) -> str:
    buffer = io.BytesIO()
    Image.new("L", size, shade % 256).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class ImagesServer:
    """Counts what it is asked for. ``answer`` may take a request's body and return another answer than pictures."""

    def __init__(self, answer: Callable[[dict[str, Any]], web.Response | None], locked: bool) -> None:
        self.answer, self.locked = answer, locked
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/images/generations", self.generate)
        return app

    def refusal(self, request: web.Request) -> web.Response | None:
        if self.locked and request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no"}}, status=401)
        return None

    async def models(self, request: web.Request) -> web.Response:
        rows = [{"id": "digits", "raydmd": {"prompts": ["3", "5"]}}, {"id": "digits-teacher"}]
        return self.refusal(request) or web.json_response({"object": "list", "data": rows})

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if (refusal := self.refusal(request)) is not None:
            return refusal
        if (other := self.answer(body)) is not None:
            return other
        width, height = map(int, body.get("size", "8x8").split("x"))
        data = [{"b64_json": png(body.get("seed", 0) + i, (width, height))} for i in range(body["n"])]
        timings = {"queue": 1.0, "encode": 0.5, "expert-1": 10.0, "expert-2": 20.0, "decode": 2.0, "total": 33.5}
        return web.json_response(
            {"created": 1, "data": data, "timings": timings, "batches": {"expert-1": 4, "expert-2": 2}}
        )


@contextmanager
def images_server(
    answer: Callable[[dict[str, Any]], web.Response | None] = lambda body: None, locked: bool = False
) -> Iterator[ImagesServer]:
    server, ready, loop = ImagesServer(answer, locked), threading.Event(), asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(server.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(20)
        loop.close()
