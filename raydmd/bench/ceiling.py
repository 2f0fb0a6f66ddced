"""How many requests a second the client itself can do: against a server that does nothing.

Run as a module, with the number of pictures and the bytes of each, it is that server: it prints its port, and ends with
its standard input.
"""

import asyncio
import base64
import json
import sys

from raydmd.bench.arrivals import Mix
from raydmd.bench.load import Record, closed_loop
from raydmd.bench.targets import HttpTarget


class Nothing(asyncio.Protocol):
    """Answers each request with the same bytes; a request ends where its Content-Length says."""

    def __init__(self, reply: bytes) -> None:
        self.reply, self.got = reply, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are whole."""
        self.got += data
        while (end := self.got.find(b"\r\n\r\n")) >= 0:
            lines = self.got[:end].lower().split(b"\r\n")
            length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
            if len(self.got) < end + 4 + length:
                return
            self.got = self.got[end + 4 + length :]
            self.transport.write(self.reply)


async def _serve(n: int, picture_bytes: int) -> None:
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n".ljust(picture_bytes, b"\0")).decode()
    body = json.dumps({"created": 0, "data": [{"b64_json": picture}] * n}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    server = await asyncio.get_running_loop().create_server(lambda: Nothing(head + body), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.close()


async def client_ceiling(mix: Mix, concurrency: int, seconds: float = 1.0, picture_bytes: int = 200) -> float:
    """Return the requests a second that one client does against a process of its own that does nothing.

    Args:
        mix: the requests.
        concurrency: at once.
        seconds: for which it is measured.
        picture_bytes: of each picture in the answers.
    """
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, str(mix.n), str(picture_bytes), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    try:
        port = int(await server.stdout.readline())
        record = Record()
        async with HttpTarget(f"http://127.0.0.1:{port}", timeout=30.0) as target:
            await closed_loop(target, mix, concurrency, None, seconds / 5, Record())
            await closed_loop(target, mix, concurrency, None, seconds, record)
        return sum(o.answer.kind == "ok" for o in record.outcomes) / record.seconds
    finally:
        server.stdin.close()
        await server.wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
