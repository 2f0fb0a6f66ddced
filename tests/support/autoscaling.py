"""A Ray head on this machine whose own autoscaler adds and removes real nodes: raylets of this machine.

Ray's `FakeMultiNodeProvider` stands for the cloud: to "launch a machine" is to start one more raylet, with the
resources and labels of the node type, and to end one is to kill it. All the rest, from the pending actor to the
node's registration and its end when idle, is what a real cluster does. What makes it work with Ray 2.60:

- `ray.cluster_utils.AutoscalingCluster` cannot be used: it reads a file that the wheel lacks, and it calls
  `ray stop`, which ends every Ray of the machine. Here the cluster's file is written in full, and only processes
  of this cluster are ended: the tree below `ray start --block`, and whatever names the cluster's own folder.
- The provider is `type: external` with the class's path as `module`. It needs ``gcs_address`` (it would assume port
  6379), ``head_node_id``, ``launch_multiple`` (else one node a request, whatever was asked for), and
  ``disable_node_updaters`` (else Ray is to be installed on each node by ssh, which fails, again and again).
- The commands' lists may be empty but must be there, and so must ``cluster_synced_files``.
- The head's node type must be called ``ray.head.default``: the provider says so of the head.
- Environment: ``RAY_FAKE_CLUSTER`` lets the provider be built; ``RAY_enable_autoscaler_v2`` chooses the autoscaler
  that knows labels; ``RAY_CLOUD_INSTANCE_ID`` and ``RAY_OVERRIDE_NODE_ID_FOR_TESTING`` tie the head's raylet to the
  provider's head, or the autoscaler waits for a head for ever; ``AUTOSCALER_UPDATE_INTERVAL_S`` is 5 by default.
- Loopback: ``--node-ip-address=127.0.0.1`` alone does nothing, for Ray turns it into the machine's address.
  ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` keeps it, and the nodes that the autoscaler starts inherit it.
- ``RAY_AUTH_MODE``: `ray start` asks for a token if the user has one, a driver with an address sends none by itself
  and then hangs. The head gets this process's mode, whatever a Ray that was started here before has made of it.
- `ray start --block` ends the head when its autoscaler dies, e.g. of a bad file: the file is checked beforehand. The
  kernel kills the head if this process is killed; the other nodes then end by themselves, within a minute or so.
- Ports that Ray fixes by default (GCS, client server, agent, autoscaler's metrics, workers) are free ones here, so
  that several such clusters and others can run side by side. The folder's path is short: sockets lie in it, and
  their paths may have 107 characters.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import ray
from ports import free_ports
from ray._private.utils import set_kill_on_parent_death_linux
from ray._raylet import AuthenticationMode, get_authentication_mode
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

HEAD_DEADLINE = 240.0  # seconds
STORE = 100 * 2**20  # bytes of each node's object store


@contextmanager
def autoscaling_cluster(
    head_resources: Mapping[str, int],
    node_types: Mapping[str, Mapping[str, Any]],
    idle_timeout_minutes: float = 0.05,
    upscaling_speed: float = 1.0,
) -> Iterator[str]:
    """Run a head with an autoscaler; yield the GCS's address, and end every process of the cluster afterwards.

    This process leaves the cluster first, if it joined it.

    Args:
        head_resources: the head's resources, e.g. ``{"CPU": 1}``; CPU and GPU are whole numbers.
        node_types: what may be added: name to ``resources`` (CPU, GPU, others), ``labels`` and ``max_workers``.
        idle_timeout_minutes: how long a node is idle before it is ended.
        upscaling_speed: nodes to add at once, as a multiple of those there are.

    Raises:
        ValidationError: a node type that Ray's schema of a cluster's file refuses.
        RuntimeError: the head did not start; says what it printed.
    """
    gcs, client, metrics = free_ports(3)
    address = f"127.0.0.1:{gcs}"
    config = cluster_config(address, head_resources, node_types, idle_timeout_minutes, upscaling_speed)
    AutoscalingConfig(deepcopy(config), skip_content_hash=True)  # else the head dies a second after it is up
    folder = Path(tempfile.mkdtemp(prefix="as", dir="/tmp"))
    (folder / "cluster.json").write_text(json.dumps(config), encoding="utf-8")
    others = {name: amount for name, amount in head_resources.items() if name not in ("CPU", "GPU")}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0",
        "--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false", "--disable-usage-stats",
        f"--temp-dir={folder}", f"--autoscaling-config={folder / 'cluster.json'}", f"--object-store-memory={STORE}",
        f"--num-cpus={head_resources.get('CPU', 0)}", f"--num-gpus={head_resources.get('GPU', 0)}",
        f"--resources={json.dumps(others)}",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment(metrics), stdout=log, stderr=log, preexec_fn=set_kill_on_parent_death_linux
        )
    try:
        _wait_started(head, folder)
        yield address
    finally:
        ray.shutdown()  # a driver that is still there when its cluster goes waits for it
        end_processes(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


def cluster_config(
    address: str,
    head_resources: Mapping[str, int],
    node_types: Mapping[str, Mapping[str, Any]],
    idle_timeout_minutes: float,
    upscaling_speed: float,
) -> dict[str, Any]:
    """Return the autoscaler's configuration: a cluster's file, as `ray up` takes it."""
    types: dict[str, Any] = {
        name: {
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
            **given,
            "resources": {"object_store_memory": STORE, **given["resources"]},
        }
        for name, given in node_types.items()
    }
    most = sum(given["max_workers"] for given in types.values())
    head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "autoscaling",
        "max_workers": most,
        "upscaling_speed": upscaling_speed,
        "idle_timeout_minutes": idle_timeout_minutes,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **types},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        **{f"{whose}setup_commands": [] for whose in ("", "head_", "worker_")},
        "cluster_synced_files": [],
    }


def environment(metrics_port: int) -> dict[str, str]:
    """Return the head's environment; see the module's words for why."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(metrics_port),
        "RAY_AUTH_MODE": "token" if get_authentication_mode() == AuthenticationMode.TOKEN else "disabled",
    }


def _wait_started(head: subprocess.Popen, folder: Path) -> None:
    """Wait until `ray start` says that the head runs; it writes the address to its folder last."""
    end = time.monotonic() + HEAD_DEADLINE
    while not (folder / "ray_current_cluster").exists():
        if head.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the head did not start: {(folder / 'head.log').read_text()}")
        time.sleep(0.05)


def cluster_processes(head: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """Return the cluster's processes: the head's tree, and those that outlived their parent but name the folder."""
    found = {process.pid: process for process in psutil.process_iter() if _names(process, folder)}
    try:
        top = psutil.Process(head.pid)
        found |= {process.pid: process for process in [top, *top.children(recursive=True)]}
    except psutil.NoSuchProcess:
        pass
    return list(found.values())


def _names(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in word for word in [*process.cmdline(), process.cwd()])
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def end_processes(head: subprocess.Popen, folder: Path) -> None:
    """Kill what belongs to the cluster until nothing does: a raylet may start a worker meanwhile."""
    end = time.monotonic() + 30.0
    while processes := cluster_processes(head, folder):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        head.poll()  # a zombie would stay in the list
        psutil.wait_procs(processes, timeout=1.0)
        assert time.monotonic() < end, f"still there: {processes}"
