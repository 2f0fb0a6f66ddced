"""`raydmd serve`: a run behind an endpoint, on this machine or on the Ray cluster that one is in."""

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

import raydmd.runtime  # before Ray: what it starts here then listens on loopback only  # noqa: F401
from raydmd.errors import RunError, UserError
from raydmd.runs import Run
from raydmd.serving.haproxy import use_haproxy
from raydmd.serving.http.headers import IMPORT_PATH
from raydmd.serving.pipeline import experts_of, read_card, stages_of
from raydmd.serving.settings import Serving, read_keys

APP = "raydmd"
Proxy = Literal["haproxy", "serve"]


def absolute(serving: Serving) -> Serving:
    """Return the settings with local paths made absolute: replicas have working folders of their own."""
    changes: dict[str, Any] = {"run": os.path.abspath(serving.run)}  # not resolved: a link may be pointed elsewhere
    if serving.api_keys_file is not None:
        changes["api_keys_file"] = str(Path(serving.api_keys_file).resolve())
    return serving.model_copy(update=changes)


def config_of(serving: Serving, host: str, port: int) -> str:
    """Return the file that `serve run` and `serve deploy` take, as YAML.

    Raises:
        UserError: the run cannot be served.
    """
    read_card(serving)
    tree = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "raydmd.serving.app:build",
                "args": serving.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }
    return "# serve run FILE, serve deploy FILE, or a RayService's serveConfigV2\n" + yaml.safe_dump(
        tree, sort_keys=False
    )


def serve_run(serving: Serving, host: str, port: int, proxy: Proxy | None, console: Console) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        serving: the settings.
        host: to listen at.
        port: to listen at.
        proxy: in front of the API, of a Ray that is started here; None: HAProxy where Ray has it.
        console: where progress is shown.

    Raises:
        UserError: a run that cannot be served, or a port that is taken.
        RunError: the replicas do not start.
    """
    experts = experts_of(read_card(serving))
    read_keys(serving)
    _check_port(host, port)
    joins = "RAY_ADDRESS" in os.environ
    if proxy == "haproxy" and joins:
        raise UserError("--proxy haproxy: it is a setting of the cluster's processes: start its nodes with "
                        "RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1")  # fmt: skip
    scratch = Path(tempfile.mkdtemp(prefix="raydmd-serve-"))
    try:
        if not joins:
            os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", IMPORT_PATH)
            if proxy != "serve":
                use_haproxy(scratch, asked=proxy is not None)
        _serve(serving, experts, host, port, console)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _serve(serving: Serving, experts: int, host: str, port: int, console: Console) -> None:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from raydmd.runtime.cluster import join_or_start
    from raydmd.serving.app import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    owned = join_or_start(claimed(serving, experts), 512)
    try:
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=host, port=port), logging_config=quiet)
        with console.status("starting replicas"):
            serve.run(application(serving), name=APP, route_prefix="/", logging_config=quiet)
        shown = f"[{host}]" if ":" in host else host
        console.print(f"serving {serving.run} at http://{shown}:{port} (Ctrl-C stops)", highlight=False, soft_wrap=True)
        _wait_for_signal()
    except RuntimeError as error:
        raise RunError(f"the replicas do not start: {' '.join(str(error).split())[:500]}") from None
    finally:
        with console.status("finishing what was begun"):
            serve.delete(APP)
        if owned:
            ray.shutdown()


def _wait_for_signal() -> None:
    """Return at Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopped.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claimed(serving: Serving, experts: int) -> float:
    """Return the CPUs that all replicas of a run with so many experts may claim together."""
    names = list(stages_of(serving, experts))
    if serving.api == "own":
        names.append("api")
    if serving.teacher:
        names.append("teacher")
    default = Run(serving.run).recipe.runtime.generator.cpus
    total = 0.0
    for name in names:
        kind = getattr(serving.stages, "expert" if name.startswith("expert") else name)
        total += kind.max * (default if kind.cpus is None else kind.cpus)
    return total


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen at {host}:{port} ({error.strerror or error})") from None
