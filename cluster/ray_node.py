"""This host's Ray node: found, drained, watched until it has no actors. Ray is imported when it is first asked."""

import asyncio
import contextlib
import difflib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

TIMEOUT = 5.0  # seconds for a request to Ray
# Ray reads these when it is imported. Its own limits for connecting, 40 seconds in all, are longer than a notice.
RAY_SETTINGS = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "2"}


def is_host_port(value: str) -> bool:
    """Say whether ``value`` is HOST:PORT, an IPv6 address in brackets."""
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]@]+):(\d{1,5})", value)
    return found is not None and 0 < int(found[1]) < 65536


def host_port(value: str, name: str) -> str:
    """Return ``value`` if it is HOST:PORT, else raise a UsageError that names ``name``."""
    if not is_host_port(value):
        raise click.UsageError(f"{name}: {value!r} is not HOST:PORT of Ray's GCS, for example 10.0.0.1:6379")
    return value


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


def draining_nodes(gcs: Any) -> dict[str, int]:
    """Return the ids of the nodes that leave, with their deadlines in milliseconds since the epoch, 0 for none."""
    if hasattr(gcs, "get_draining_nodes"):
        return dict(gcs.get_draining_nodes(timeout=TIMEOUT))
    from ray._raylet import GcsClientOptions, GlobalStateAccessor  # type: ignore[attr-defined]

    options = GcsClientOptions.create(gcs.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True)
    accessor = GlobalStateAccessor(options)  # before Ray 2.60
    if not accessor.connect():
        raise OSError("the GCS does not answer")
    return dict(accessor.get_draining_nodes())


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
            module: Any = authentication
            if hasattr(module, "maybe_enable_token_auth_if_token_available"):  # an older Ray takes no file by itself
                module.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
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
            standing = draining_nodes(gcs).get(node_id, 0)  # 0 also means: no deadline
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
