"""`raydmd serve`: a run or an export behind an endpoint, on this machine or on the Ray cluster that one is in."""

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from contextlib import nullcontext
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from raydmd.config.plugins import nodes_environment
from raydmd.errors import RunError, UserError
from raydmd.extras import require_extra
from raydmd.interrupts import graceful
from raydmd.models.base import one_line
from raydmd.models.diffusers.hub import HUB
from raydmd.runs.student import Student
from raydmd.runtime import cluster_address  # before Ray: what it starts here then listens on loopback only
from raydmd.serving.card import open_served, read_card
from raydmd.serving.haproxy import HeldPorts, trusted, use_haproxy
from raydmd.serving.haproxy_log import proxy_log
from raydmd.serving.http.headers import IMPORT_PATH
from raydmd.serving.log import cause_of, default_file, repeated, write_log
from raydmd.serving.pipeline import stages_of
from raydmd.serving.settings import Serving, read_keys

APP = "raydmd"
Proxy = Literal["haproxy", "serve"]
PROXY_READY_S = 20.0
"""Within which Serve's proxy has to start, else Serve kills it; Serve's own 5 s are few on a busy machine."""


def absolute(serving: Serving) -> Serving:
    """Return the settings with local paths made absolute: replicas have working folders of their own."""
    changes: dict[str, Any] = {"run": os.path.abspath(serving.run)}  # not resolved: a link may be pointed elsewhere
    if serving.base is not None and not serving.base.startswith(HUB):
        changes["base"] = os.path.abspath(serving.base)
    if serving.api_keys_file is not None:
        changes["api_keys_file"] = str(Path(serving.api_keys_file).resolve())
    if serving.log_file is not None:
        changes["log_file"] = os.path.abspath(serving.log_file)
    return serving.model_copy(update=changes)


def checked(serving: Serving, console: Console) -> Student:
    """Open what is to be served, and refuse what cannot be, in seconds; say what its user should know.

    Raises:
        UserError: it cannot be served.
    """
    student = open_served(serving)
    read_card(serving, student)
    for remark in student.check():
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    return student


def config_of(serving: Serving, host: str, port: int, console: Console) -> str:
    """Return the file that `serve run` and `serve deploy` take, as YAML.

    Raises:
        UserError: it cannot be served.
    """
    checked(serving, console)
    application: dict[str, Any] = {
        "name": APP,
        "route_prefix": "/",
        "import_path": "raydmd.serving.app:build",
        "args": serving.model_dump(mode="json", exclude_defaults=True),
    }
    if variables := nodes_environment():  # a plugin's file is where the run is: on every node
        application["runtime_env"] = {"env_vars": variables}
    tree = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [application],
    }
    return "# serve run FILE, serve deploy FILE, or a RayService's serveConfigV2\n" + yaml.safe_dump(
        tree, sort_keys=False
    )


def serve_run(
    serving: Serving, host: str, port: int, proxy: Proxy | None, console: Console, no_keys: bool = False
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        serving: the settings.
        host: to listen at.
        port: to listen at.
        proxy: in front of the API, of a Ray that is started here; None: HAProxy where Ray has it.
        console: where progress is shown.
        no_keys: let everybody ask, wherever that is reached from.

    Raises:
        UserError: a run that cannot be served, or a port that is taken.
        RunError: the replicas, or Serve's proxy, do not start.
    """
    student = checked(serving, console)
    if student.family.frames > 1:
        require_extra("video", f"{serving.run}: videos")
    demand_keys(serving, host, no_keys)
    joins = cluster_address() is not None
    if proxy == "haproxy" and joins:
        raise UserError("--proxy haproxy: it is a setting of the cluster's processes: start its nodes with "
                        "RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1")  # fmt: skip
    ports, folder = HeldPorts(host, port), None
    try:
        if joins:
            ports.close()  # Serve's proxies there may not share it
        else:
            os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", IMPORT_PATH)
            os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(PROXY_READY_S))
            if proxy != "serve":
                folder = use_haproxy(host, port, ports, asked=proxy is not None)
            if folder is None:  # Serve's proxy is what clients reach: it obeys the user's own proxies alone
                os.environ["FORWARDED_ALLOW_IPS"] = ",".join(trusted())
        log = Path(serving.log_file or default_file(port))
        log.open("a", encoding="utf-8").close()
        with repeated(log, sys.stderr), proxy_log(folder) if folder is not None else nullcontext():
            write_log(str(log))
            logged = serving.model_copy(update={"log_file": str(log)})
            _serve(logged, student, host, port, folder is not None, console)
    finally:
        ports.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def demand_keys(serving: Serving, host: str, no_keys: bool) -> None:
    """Refuse to serve strangers without API keys, unless that is what is wanted.

    Raises:
        UserError: no keys, and an address that others than this machine can reach; or a file of keys that has none.
    """
    if not read_keys(serving) and not no_keys and not is_loopback(host):
        ways = "RAYDMD_API_KEY, --api-key, --set api_keys_file=FILE"
        raise UserError(f"--host {host}: others than this machine can reach it: give API keys ({ways}), "
                        f"or let everybody in with --no-keys")  # fmt: skip


def is_loopback(host: str) -> bool:
    """Return whether an address, or all that a name stands for, can be reached from this machine alone."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return all(ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _serve(serving: Serving, student: Student, host: str, port: int, behind: bool, console: Console) -> None:
    """Start Ray, Serve and the replicas, and serve.

    Args:
        serving: the settings.
        student: what is served.
        host: that clients reach.
        port: that clients reach.
        behind: HAProxy listens there, and all else on loopback.
        console: where progress is shown.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from raydmd.runtime.cluster import joined
    from raydmd.serving.app import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    keeps_log = student.reloads and os.access(serving.run, os.W_OK)  # an export is others' to load: it stays as it is
    log = Path(serving.run if keeps_log else tempfile.gettempdir()) / "run.log"
    with joined(claimed(serving, student), 512, log) as ray_health:
        try:
            quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
            options = HTTPOptions(host="127.0.0.1" if behind else host, port=port)
            try:
                serve.start(ProxyLocation.HeadOnly, options, logging_config=quiet)
            except (RayError, TimeoutError) as error:
                said = f"Serve's proxy does not start here, on a machine that may be too busy: {one_line(error)}"
                raise ray_health.error() or RunError(said) from None
            with console.status("starting replicas"):
                serve.run(application(serving), name=APP, route_prefix="/", logging_config=quiet)
            shown = f"[{host}]" if ":" in host else host
            where = f"http://{shown}:{port} (Ctrl-C stops); log: {serving.log_file}"
            console.print(f"serving {serving.run} at {where}", highlight=False, soft_wrap=True)
            _wait_for_signal()
        except RuntimeError as error:
            kind, words = cause_of("\n".join([str(error), *_of_deployments()]))
            if ray_health.error() is None and kind == UserError.__name__:
                raise UserError(words) from None
            said = f"the replicas do not start: {kind}{': ' if kind else ''}{words[:1000]}"
            raise ray_health.error() or RunError(said) from None
        finally:
            if ray_health.error() is None:
                with console.status("finishing what was begun"):
                    serve.delete(APP)


def _of_deployments() -> list[str]:
    """Return what Serve says of the deployments that are not well."""
    from ray import serve

    try:
        application = serve.status().applications.get(APP)
    except Exception:  # Serve is gone: what is known is known already
        return []
    deployments = application.deployments.values() if application is not None else ()
    return [each.message for each in deployments if each.message and each.status != "HEALTHY"]


def _wait_for_signal() -> None:
    """Return at the first of Ctrl-C, SIGTERM and SIGHUP."""
    stopped = threading.Event()
    with graceful(stopped.set):
        stopped.wait()


def claimed(serving: Serving, student: Student) -> float:
    """Return the CPUs that all replicas of a student may claim together."""
    names = list(stages_of(serving, len(student.phases)))
    if serving.api == "own":
        names.append("api")
    if serving.teacher:
        names.append("teacher")
    default = student.recipe.runtime.generator.cpus
    total = 0.0
    for name in names:
        kind = getattr(serving.stages, "expert" if name.startswith("expert") else name)
        total += kind.max * (default if kind.cpus is None else kind.cpus)
    return total
