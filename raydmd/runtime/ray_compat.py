"""All that raydmd needs of Ray's private parts, and the versions of Ray that have them.

``cluster/ray_node.py`` has what it needs itself: it runs on nodes that may have no raydmd.
"""

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

import ray

from raydmd import interrupts
from raydmd.errors import UserError

OLDEST, NEWEST = (2, 58), (2, 60)  # Ray's versions; pyproject.toml allows the same
SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER


def check_version() -> None:
    """Refuse a Ray whose private parts are not known.

    Raises:
        UserError: names the versions that work.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", ray.__version__)[:2])
    if not OLDEST <= found <= NEWEST:
        (major, first), (_, last) = OLDEST, NEWEST
        wanted = f"'ray[default,train,data]>={major}.{first},<{major}.{last + 1}'"
        raise UserError(f"Ray {ray.__version__}: it is to be {major}.{first} to {major}.{last}; pip install {wanted}")


@contextmanager
def own_signals() -> Iterator[None]:
    """While Ray starts inside, keep SIGTERM with whoever has it now.

    Ray's Python side would turn it into SystemExit, and its native side into a stack trace on stderr. That one is
    installed once in a process: so it is done here, and what it replaced is put back before any work depends on it.
    Without these private names SIGTERM ends a run as Ray would have it.
    """
    from ray._private import utils

    if not interrupts.installed():  # a library's SIGTERM is Ray's to handle, as its users know it
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    module: Any = utils
    replaced = module.set_sigterm_handler
    try:
        install = ctypes.CDLL(ray._raylet.__file__)._ZN3ray6RayLog27InstallFailureSignalHandlerEPKcb
        install.argtypes, install.restype = [ctypes.c_char_p, ctypes.c_bool], None
        install(None, False)
        signal.signal(signal.SIGTERM, handler)
    except (AttributeError, OSError):
        pass
    module.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        module.set_sigterm_handler = replaced
        signal.signal(signal.SIGTERM, handler)


def adopt_orphans() -> None:
    """Make this process the parent of its grandchildren whose parent dies, so that it can end them (Linux)."""
    try:
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    except (AttributeError, OSError):
        pass


def node_processes() -> dict[str, "subprocess.Popen[bytes]"]:
    """Return the raylet and the control store (GCS) that this process started; none where it joined a cluster."""
    node = ray._private.worker._global_node
    if node is None:
        return {}
    names = {"raylet": "raylet", "gcs_server": "control store (gcs_server)"}
    return {names[kind]: infos[-1].process for kind, infos in node.all_processes.items() if kind in names and infos}


def joined_ports() -> dict[str, tuple[str, int]]:
    """Return where the control store of the cluster and this machine's raylet listen: (host, port) by name."""
    node, here = ray._private.worker._global_node, ray.get_runtime_context().get_node_id()
    assert node is not None
    host, _, port = node.gcs_address.rpartition(":")
    found = {"control store (GCS)": (host.strip("[]"), int(port))}
    for each in ray.nodes():
        if each["NodeID"] == here:
            found["raylet"] = (each["NodeManagerAddress"], each["NodeManagerPort"])
    return found


def gcs_answers(address: str, timeout_s: float) -> bool:
    """Whether a gRPC server (a Ray's control store) answers at HOST:PORT; never takes longer than ``timeout_s``."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    channel = init_grpc_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=timeout_s)
        return True
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()


def demands_other_token(address: str, timeout_s: float) -> bool:
    """Whether the Ray at HOST:PORT demands a token that this process does not give; silence is no refusal."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    channel = init_grpc_channel(address)
    try:
        NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAUTHENTICATED
    finally:
        channel.close()
    return False


def check_token() -> None:
    """Raise RuntimeError where the cluster demands a token and none is found; Ray's native code ends the process."""
    from ray._private.authentication import authentication_token_setup as authentication

    authentication.ensure_token_if_auth_enabled(None, create_token_if_missing=False)


def resolved(address: str) -> str:
    """Return HOST:PORT at which Ray will look for a cluster: that which ``auto`` finds, this node's for loopback.

    Raises:
        ConnectionError: none runs on this machine.
        ValueError: it is of another form.
    """
    from ray._private import services

    found = services.get_ray_address_from_environment("auto", None) if address == "auto" else address
    return str(services.canonicalize_bootstrap_address(found))


def quiet_dead_workers() -> None:
    """Have Ray not print the logs of workers that died: the runtime tells of them in its own words."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")


def no_accidental_start() -> None:
    """Have no call start a Ray by itself, such as one in a clean-up after ``ray.shutdown()``."""
    from ray._private import auto_init_hook

    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # of processes that are started from here
    auto_init_hook.enable_auto_connect = False


@contextmanager
def in_a_group_of_its_own() -> Iterator[None]:
    """Start Ray's processes in process groups of their own for the time of the block.

    A signal that a terminal, a service manager or `timeout` sends to this command's group then ends this process alone,
    which ends Ray: else Ray's would be gone before the command has let go of what runs on it. They still die with
    this process, however it ends.
    """
    from ray._private import services

    module: Any = services
    before = module.ConsolePopen
    module.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        module.ConsolePopen = before


def actor_record(actor: Any) -> dict[str, Any]:
    """Return what Ray's control store knows of an actor: ``State``, ``Pid`` (0 before it has a process) and more."""
    from ray._private.state import state

    return dict(state.actor_table(actor._actor_id.hex(), None, None))


def living_actors(class_name: str) -> int:
    """Return how many actors of this job, whose class's name has ``class_name`` in it, are there or on their way."""
    from ray._private.state import state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    actors = state.actor_table(None, job, None).values()
    return sum(class_name in actor["ActorClassName"] and actor["State"] != "DEAD" for actor in actors)


def draining_nodes() -> dict[str, float]:
    """Return the nodes that Ray is told will go away, with the time.time() of their end (infinity: no date)."""
    from ray._private.state import state

    return {node: at / 1000 if at else float("inf") for node, at in state.get_draining_nodes().items()}


def pending_requests() -> Iterator[tuple[dict[str, float], list[str], int]]:
    """Yield what Ray's nodes lack room for: resources by name, keys of the labels asked for, how many such requests."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    gcs = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    for pending in get_cluster_resource_state(gcs).pending_resource_requests:
        selectors = pending.request.label_selectors
        keys = [constraint.label_key for each in selectors[:1] for constraint in each.label_constraints]
        yield dict(pending.request.resources_bundle), keys, pending.count


@contextmanager
def driver_prints_to(stream: TextIO | None) -> Iterator[None]:
    """While inside, write to ``stream`` what Ray's driver prints of its nodes ("(raylet) ...", the autoscaler)."""
    from ray._private import worker

    module: Any = worker
    before = module.print_worker_logs

    def kept(data: Any, print_file: Any, ignore_prefix: bool = False) -> None:
        before(data, stream or print_file, ignore_prefix)

    module.print_worker_logs = kept
    try:
        yield
    finally:
        module.print_worker_logs = before


def node_labels() -> frozenset[str]:
    """Return the node labels that Ray keeps for itself: ``ray.io/...``."""
    from ray import _raylet

    names = {getattr(_raylet, name) for name in dir(_raylet) if re.fullmatch(r"RAY_NODE_\w+_KEY", name)}
    return frozenset(str(name) for name in names)


def check_label(key: str, value: str) -> None:
    """Check a node label's syntax.

    Raises:
        ValueError: Ray does not take it.
    """
    from ray._private.label_utils import validate_label_key, validate_label_value

    validate_label_key(key)
    validate_label_value(value)


def check_cluster_config(document: dict[str, Any]) -> None:
    """Let Ray's cluster launcher complete and check the content of a cluster's file, which it may change.

    Raises:
        Exception: of many kinds, jsonschema's ValidationError among them: the launcher does not take it.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(document))


def serve_haproxy() -> Any:
    """Return the module of Ray Serve that runs HAProxy; its ``HAProxyApi`` is what the controller's actor uses."""
    from ray.serve._private import haproxy

    return haproxy


def keep_replica_at_home() -> None:
    """Bind this replica's gRPC server to the node's address; to be called in a deployment's constructor.

    Every replica opens one on all interfaces, for handles that ask for gRPC (none does here), and unpickles what comes.
    """
    from ray.serve._private import replica as serve_replica

    module: Any = serve_replica
    add, address = module.add_port_to_grpc_server, ray.util.get_node_ip_address()
    if not hasattr(add, "keeps"):
        host = f"[{address}]" if ":" in address else address

        def add_at_home(server: Any, where: str) -> Any:
            return add(server, where.replace("[::]", host))

        add_at_home.keeps = True  # type: ignore[attr-defined]
        module.add_port_to_grpc_server = add_at_home
