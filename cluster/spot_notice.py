#!/usr/bin/env python3
"""Turn a cloud's notice that it takes this machine away into Ray's drain state for this node.

``watch`` runs beside ``ray start`` and asks the cloud's metadata server; ``now`` is for a Kubernetes preStop hook.
A drained node keeps its actors and gets no new ones; who reads Ray's draining nodes sees it with its deadline. A
worker node that is drained and idle leaves by itself. Ray takes any new deadline, so a later one than stands is never
sent. Needs Ray and click, nothing else of this project. Notices and the time that they leave:

======  ==================================================  ==========================================================
aws     spot/instance-action                                until its ``time`` (about two minutes)
aws     events/recommendations/rebalance                    none is told: ``--rebalance-deadline``
gcp     instance/preempted                                  30 seconds
gcp     instance/maintenance-event TERMINATE_ON_...         60 seconds
azure   Preempt, Terminate, Redeploy, Reboot for this VM    until ``NotBefore``; none when it has started
======  ==================================================  ==========================================================

Ray's token authentication works as for ``ray start``: by RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or the
file ~/.ray/auth_token.
"""

import asyncio
import contextlib
import difflib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click
from clouds import LINK_LOCAL, SOURCES, MetadataError, Notice, discover

TIMEOUT = 5.0  # seconds for a request to Ray
LONGEST_PAUSE = 10.0  # seconds between two tries when the metadata server fails
GRACE = 30.0  # seconds for which a notice without time left is tried still
PAUSE = 0.5  # seconds between two questions to Ray
# Ray reads these when it is imported. Its own limits for connecting, 40 seconds in all, are longer than a notice.
RAY_SETTINGS = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "2"}


def say(text: str) -> None:
    """Write one line to stderr, whatever line breaks an error's text has."""
    click.echo("spot_notice: " + " ".join(text.split()), err=True)


@dataclass
class Complaints:
    """Says what is wrong once a subject, until it is right again."""

    said: set[str] = field(default_factory=set)

    def say(self, subject: str, text: str) -> None:
        """Say ``text`` unless ``subject`` is wrong already."""
        if subject not in self.said:
            self.said.add(subject)
            say(text)

    def over(self, subject: str, text: str) -> None:
        """Say ``text`` if ``subject`` was wrong."""
        if subject in self.said:
            self.said.remove(subject)
            say(text)


# Ray


class Unreachable(Exception):
    """Ray cannot be asked at the moment."""


class NoNode(click.ClickException):
    """No alive Ray node is on this host."""


@contextlib.contextmanager
def ray_errors() -> Iterator[None]:
    """Make of Ray's errors an Unreachable, or a ClickException where another try would end the same."""
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        raise click.ClickException(f"Ray refuses this process: {error}") from error
    except (RayError, OSError) as error:
        raise Unreachable(str(error) or type(error).__name__) from error


def is_local(address: str) -> bool:
    """Say whether ``address`` belongs to one of this host's interfaces: only such a one can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
        return True
    except OSError:
        return False


@dataclass
class LocalNode:
    """This host's node of the Ray whose GCS is at ``address``; what is None is found, anew each time."""

    address: str | None
    node_id: str | None

    def connect(self) -> Any:
        """Return a client of the GCS, within seconds and without ``ray.init``."""
        from ray._private import services
        from ray._private.authentication import authentication_token_setup as authentication
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        with ray_errors():
            authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            # Ray's native code ends the process where a token is missing: ask first.
            authentication.ensure_token_if_auth_enabled(None, create_token_if_missing=False)
            # Not Ray's canonical address: that turns a loopback address into another interface's.
            address = self.address or services.get_ray_address_from_environment("auto", None)
            host, port = host_port(address, "RAY_ADDRESS").rsplit(":", 1)
            socket.create_connection((host.strip("[]"), int(port)), 1.0).close()  # Ray's client is slow to give up
            return GcsClient(address=address)

    def find(self, gcs: Any) -> str:
        """Return the node's id; NoNode or, of several nodes or an unknown --node-id, a UsageError."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

        with ray_errors():
            infos = gcs.get_all_node_info(timeout=TIMEOUT).values()
        alive = {n.node_id.hex(): n.node_manager_address for n in infos if n.state == GcsNodeInfo.ALIVE}
        if self.node_id:  # Ray takes any id and does nothing about an unknown one
            if self.node_id not in alive:
                near = difflib.get_close_matches(self.node_id, alive, n=1)
                hint = f"did you mean {near[0]}?" if near else f"alive: {', '.join(sorted(alive))}"
                raise click.UsageError(f"--node-id: no alive Ray node is {self.node_id}; {hint}")
            return self.node_id
        told = {os.environ.get("RAY_NODE_IP"), os.environ.get("POD_IP")}
        mine = [i for i, at in alive.items() if at in told] or [i for i, at in alive.items() if is_local(at)]
        if not mine:
            raise NoNode("no alive Ray node has one of this host's addresses; name the node with --node-id")
        if len(mine) > 1:
            names = ", ".join(f"{i} ({alive[i]})" for i in sorted(mine))
            raise click.UsageError(f"several alive Ray nodes are on this host: {names}; choose one with --node-id")
        return mine[0]

    def drain(self, cloud: str, kind: str, deadline: float) -> str:
        """Drain the node until ``deadline``, seconds since the epoch; print what was done as JSON, return the id."""
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]

        gcs = self.connect()
        node_id, deadline_ms = self.find(gcs), int(deadline * 1000)
        with ray_errors():
            standing = gcs.get_draining_nodes(timeout=TIMEOUT).get(node_id, 0)  # 0 also means: no deadline
            nearer = not 0 < standing <= deadline_ms
            if nearer:
                message = f"spot notice: {cloud} {kind}"
                reason = DRAIN_NODE_REASON_PREEMPTION
                accepted, why = gcs.drain_node(node_id, reason, message, deadline_ms, timeout=TIMEOUT)
                if not accepted:
                    raise click.ClickException(f"Ray does not drain {node_id}: {why}")
        left = round(max(deadline - time.time(), 0.0), 1)
        line = {"cloud": cloud, "kind": kind, "deadline_seconds": left, "node_id": node_id, "drained": nearer}
        click.echo(json.dumps(line))  # drained is false where a nearer deadline stood
        return node_id

    def busy(self, node_id: str) -> bool:
        """Say whether the node is alive and has actors, as far as Ray can be asked."""
        from ray.core.generated.gcs_pb2 import ActorTableData, GcsNodeInfo  # type: ignore[attr-defined]

        async def actors(gcs: Any) -> Any:
            return await gcs.async_get_all_actor_info(timeout=TIMEOUT)

        try:
            gcs = self.connect()
            with ray_errors():
                nodes = gcs.get_all_node_info(timeout=TIMEOUT).values()
                if not any(n.node_id.hex() == node_id and n.state == GcsNodeInfo.ALIVE for n in nodes):
                    return False
                here = [a for a in asyncio.run(actors(gcs)).values() if a.address.node_id.hex() == node_id]
                return any(actor.state != ActorTableData.DEAD for actor in here)
        except Unreachable:
            return True


# The commands


def host_port(value: str, name: str) -> str:
    """Return ``value`` if it is HOST:PORT, else raise a UsageError that names ``name``."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}", value):
        raise click.UsageError(f"{name}: {value!r} is not HOST:PORT of Ray's GCS, for example 10.0.0.1:6379")
    return value


def check_address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check --address."""
    return value and host_port(value, "--address")


def check_node_id(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check --node-id."""
    if value is not None and not re.fullmatch(r"[0-9a-f]{56}", value):
        raise click.UsageError(f"--node-id: {value!r} is not a Ray node's id: 56 digits of 0-9 and a-f")
    return value


def check_url(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Check --metadata-url."""
    if not re.fullmatch(r"http://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+)(:\d{1,5})?/?", value):
        raise click.UsageError(f"--metadata-url: {value!r} is not http://HOST[:PORT], for example {LINK_LOCAL}")
    return value.rstrip("/")


def check_seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Check a number of seconds, which click lets be no number."""
    if not 0.01 <= value <= 1e6:
        raise click.UsageError(f"{parameter.opts[0]}: {value} is not a number of seconds from 0.01 to 1000000")
    return value


def node_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which node of which Ray."""
    node_help = "Ray's id of the node; by default the alive node at RAY_NODE_IP, POD_IP or an interface's address."
    address_help = "HOST:PORT of Ray's GCS; by default RAY_ADDRESS, else the Ray that was started on this host."
    command = click.option("--node-id", metavar="HEX", callback=check_node_id, help=node_help)(command)
    return click.option("--address", metavar="HOST:PORT", callback=check_address, help=address_help)(command)


@click.group(no_args_is_help=False)
def cli() -> None:
    """Turn a cloud's spot notice into Ray's drain state for this node.

    Example: spot_notice.py watch --cloud aws
    """


@cli.command()
@click.option("--cloud", type=click.Choice(["auto", *SOURCES]), default="auto", show_default=True, help="The cloud.")
@click.option("--every", default=2.0, show_default=True, callback=check_seconds, help="Seconds between two polls.")
@click.option(
    "--metadata-url", default=LINK_LOCAL, show_default=True, callback=check_url, help="The metadata server, for tests."
)
@click.option(
    "--rebalance-deadline", default=120.0, show_default=True, callback=check_seconds,
    help="Seconds that an AWS rebalance recommendation is taken to leave.",
)  # fmt: skip
@click.option("--ignore-rebalance", is_flag=True, help="Do not drain for an AWS rebalance recommendation.")
@click.option("--once", is_flag=True, help="End after the first notice that was passed on.")
@node_options
def watch(
    cloud: str, every: float, metadata_url: str, rebalance_deadline: float, ignore_rebalance: bool, once: bool,
    address: str | None, node_id: str | None,
) -> None:  # fmt: skip
    """Wait for notices; drain this node at each and print a line of JSON.

    Example: spot_notice.py watch --cloud aws
    """
    local, complaints = LocalNode(address, node_id), Complaints()
    try:  # what only the user can mend is told now, not when the notice comes
        local.find(local.connect())
    except Unreachable as error:
        complaints.say("ray", f"Ray cannot be reached yet: {error}")
    except NoNode as error:
        complaints.say("ray", f"{error.message} (looked for again at a notice)")
    rebalance = None if ignore_rebalance else rebalance_deadline
    source = None if cloud == "auto" else SOURCES[cloud](metadata_url, rebalance)
    pending: dict[str, tuple[Notice, float]] = {}  # by name: the notice as first seen, and until when it is tried
    done: set[str] = set()
    failures = 0
    while True:
        began = time.monotonic()
        try:
            source = source or discover(metadata_url, rebalance)
            for notice in source.notices(wait=not pending):
                if notice.name not in done:
                    pending.setdefault(notice.name, (notice, max(notice.deadline, time.time() + GRACE)))
            failures = 0
            complaints.over("metadata", f"the metadata server at {metadata_url} answers again")
        except MetadataError as error:
            failures += 1
            complaints.say("metadata", f"{error} (trying on)")
        for name, (notice, until) in list(pending.items()):
            if pass_on(local, notice, until, complaints):
                done.add(name)
                del pending[name]
                if once:
                    return
        pause = max(every, min(every * 2 ** min(failures, 10), LONGEST_PAUSE)) if not pending else every
        time.sleep(max(0.0, pause - (time.monotonic() - began)))


def pass_on(local: LocalNode, notice: Notice, until: float, complaints: Complaints) -> bool:
    """Try to drain for ``notice``; true if that is done, or no use any more after ``until``."""
    try:
        local.drain(notice.cloud, notice.kind, notice.deadline)
    except (Unreachable, click.ClickException) as error:
        text = error.message if isinstance(error, click.ClickException) else f"Ray cannot be reached: {error}"
        if time.time() < until:
            complaints.say(notice.name, f"{notice.cloud} {notice.kind}: {text} (trying on)")
            return False
        say(f"{notice.cloud} {notice.kind}: given up: {text}")
    return True


@cli.command()
@click.option("--deadline", type=float, required=True, callback=check_seconds, help="Seconds that this node has left.")
@click.option("--wait", is_flag=True, help="Block until this node has no actors, at most until the deadline.")
@node_options
def now(deadline: float, wait: bool, address: str | None, node_id: str | None) -> None:
    """Drain this node at once, as a Kubernetes preStop hook does.

    Example: spot_notice.py now --deadline 30 --wait
    """
    local, complaints, until = LocalNode(address, node_id), Complaints(), time.time() + deadline
    while True:
        try:
            local.node_id = local.drain("none", "now", until)
            break
        except Unreachable as error:
            if time.time() >= until:
                raise click.ClickException(f"Ray cannot be reached: {error}") from error
            complaints.say("ray", f"Ray cannot be reached: {error} (trying on)")
            time.sleep(PAUSE)
    while wait and time.time() < until and local.busy(local.node_id):
        time.sleep(min(PAUSE, max(0.0, until - time.time())))


def main() -> int:
    """Run the command line; an error is one line on stderr."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        say(error.format_message())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
