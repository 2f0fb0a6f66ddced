"""The few calls of the hub's HTTP API that an upload makes, served on loopback: what is uploaded is kept in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Uploads:
    """What a hub has been given.

    Attributes:
        endpoint: its address.
        made: bodies of the calls that made a model.
        files: content by path.
        status: of every answer; another than 200 refuses.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.made: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.status = 200


@contextmanager
def upload_server() -> Iterator[Uploads]:
    """Run a hub that takes every file in its commit, and none by Git LFS."""
    uploads = Uploads()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name = "/".join(self.path.strip("/").split("/")[2:4])
            self.answer({"id": name, "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.read()
            call = self.path.partition("?")[0].rsplit("/", 2)[1]
            model = self.path.removeprefix("/api/models").partition("/commit/")[0]
            if uploads.status != 200:
                self.answer({"error": "refused"})
            elif self.path.endswith("/repos/create"):
                uploads.made.append(json.loads(body))
                self.answer(
                    {"url": f"{uploads.endpoint}/{uploads.made[-1]['organization']}/{uploads.made[-1]['name']}"}
                )
            elif call == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for file in json.loads(body)["files"]]  # fmt: skip
                self.answer({"files": files})
            elif call == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        uploads.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer(
                    {"success": True, "commitOid": "0" * 40, "commitUrl": f"{uploads.endpoint}{model}/commit/0"}
                )
            else:
                self.answer({})

        def read(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(uploads.status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    uploads.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield uploads
    finally:
        server.shutdown()
        server.server_close()
