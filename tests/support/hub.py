"""A hub for tests: a cache laid out as huggingface_hub does, and a server with the few calls that a download makes."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(folder: Path, cache: Path, name: str, commit: str, revision: str = "main") -> Path:
    """Put a folder's files into a cache as one commit of a model; return the snapshot's folder."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = model / "blobs" / f"{commit[:8]}{number}", snapshot / file.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / revision).write_text(commit)
    return snapshot


class HubServer:
    """Serves folders as models of a hub.

    Attributes:
        models: (name, revision) to its folder; the commit is made of the folder's name.
        asked: method and path of every request.
        refusals: names of models that are refused, to status and error code.
    """

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Path] = {}
        self.asked: list[str] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        self.endpoint = ""

    def fetched(self) -> set[str]:
        """Return the names of files that were downloaded."""
        found = (re.fullmatch(r"GET /.*/resolve/[^/]+/(.*)", line) for line in self.asked)
        return {match[1] for match in found if match}


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()  # noqa: S324


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server; its ``endpoint`` is what HF_ENDPOINT takes."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").removeprefix("api/models/").split("/")
            name, call, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
            if name in hub.refusals:
                status, code = hub.refusals[name]
                return self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, body)
            commits = {commit_of(folder): folder for (one, _), folder in hub.models.items() if one == name}
            revisions = {key[1]: folder for key, folder in hub.models.items() if key[0] == name}
            revision = rest[0] if rest else "main"
            folder = commits.get(revision) or revisions.get(revision)
            if folder is None:
                code = "RevisionNotFound" if revisions else "RepoNotFound"
                return self.send(404, b"", {"X-Error-Code": code}, body)
            commit, files = commit_of(folder), sorted(path for path in folder.rglob("*") if path.is_file())
            if call in ("", "revision"):
                tree: object = {"id": name, "sha": commit, "siblings": []}
            elif call == "tree":
                tree = [{"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size,
                         "oid": commit_of(file)} for file in files]  # fmt: skip
            else:
                file = folder / "/".join(rest[1:])
                return self.send(
                    200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{commit_of(file)}"'}, body
                )
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
