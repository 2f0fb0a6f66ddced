"""The spot-notice bridge: the script itself against metadata servers on loopback and a Ray of several nodes."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import ray
from cloud_metadata import AwsMetadata, AzureMetadata, Forwarder, GcpMetadata, Metadata, wait_until
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.exceptions import ActorUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raydmd.runtime  # before Ray  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_notice.py"
STORE = 80 * 2**20
NOWHERE = "127.0.0.1:9"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and one more node, at another address of loopback."""
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@ray.remote(num_cpus=0)
class Tenant:
    def ping(self) -> int:
        return os.getpid()


class Worker:
    """A worker node at 127.0.0.2 with an actor: a drained node without one would leave."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.node = cluster.add_node(num_cpus=1, object_store_memory=STORE, node_ip_address="127.0.0.2")
        self.id = self.node.node_id
        self.tenant = self.new_actor()
        self.pid = ray.get(self.tenant.ping.remote())

    def new_actor(self) -> Any:
        return Tenant.options(scheduling_strategy=NodeAffinitySchedulingStrategy(self.id, soft=False)).remote()

    @property
    def drained_until(self) -> float | None:
        """When Ray thinks that the node leaves, in seconds since the epoch; None where it is not draining."""
        deadline = draining().get(self.id)
        return None if deadline is None else deadline / 1000

    def alive(self) -> bool:
        return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self.id)


def draining() -> dict[str, int]:
    return ray._private.state.state.get_draining_nodes()


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[Worker]:
    worker = Worker(cluster)
    yield worker
    ray.kill(worker.tenant)
    if worker.drained_until is not None:
        wait_until(lambda: not worker.alive())  # Ray ends it itself
    cluster.remove_node(worker.node, allow_graceful=True)
    wait_until(lambda: not worker.alive())


def environment(**more: str) -> dict[str, str]:
    """This one, with proxies that lead nowhere and nothing that tells the script more than its options do."""
    mine = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy" and k not in ("RAY_ADDRESS", "POD_IP")}
    return mine | {"http_proxy": f"http://{NOWHERE}", "HTTP_PROXY": f"http://{NOWHERE}"} | more


class Script:
    """The script as a process; ``lines`` and ``says`` are what it has written so far. A context that ends it."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, str(SCRIPT), *arguments]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env or environment())

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().split("\n")[:-1]]

    @property
    def says(self) -> list[str]:
        return [line for line in self.err.read_text().splitlines() if line.startswith("spot_notice: ")]

    def wait_lines(self, count: int) -> dict[str, Any]:
        """Wait for that many lines of output; the last."""
        wait_until(lambda: len(self.lines) >= count)
        assert len(self.lines) == count
        return self.lines[-1]

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert "Traceback" not in self.err.read_text()


def watch(folder: Path, server: Metadata, cluster: Cluster, worker: Worker | None, cloud: str, *more: str) -> Script:
    """``watch`` of ``server`` for ``worker``, else for the head."""
    node_id = worker.id if worker else cluster.head_node.node_id
    places = ["--metadata-url", server.url, "--address", cluster.address, "--node-id", node_id]
    return Script(folder, "watch", "--cloud", cloud, "--every", "0.05", *places, *more)


def soon(seconds: int) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)


def zulu(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.ray_private
def test_aws_recommendation_then_termination(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    second = worker.new_actor()
    assert ray.get(second.ping.remote()) != worker.pid  # until the notice, another actor is taken
    ray.kill(second)
    with (
        AwsMetadata() as server,
        watch(tmp_path, server, cluster, worker, "aws", "--rebalance-deadline", "600") as script,
    ):
        server.wait_for(server.REBALANCE, 404)
        assert draining() == {} and script.lines == []  # no notice, nothing drained

        before = time.time()
        server.found[server.REBALANCE] = {"noticeTime": zulu(soon(-1))}
        line = script.wait_lines(1)
        assert line.pop("deadline_seconds") == pytest.approx(600, abs=60)
        assert line == {"cloud": "aws", "kind": "rebalance", "node_id": worker.id, "drained": True}
        assert worker.drained_until and before + 600 <= worker.drained_until + 0.001 <= time.time() + 600

        server.tokens.clear()  # all expire: refused once, renewed
        server.wait_for(server.REBALANCE, 200)
        assert server.given == 2 and len(script.lines) == 1  # the same notice is not sent twice

        when = soon(200)
        server.found[server.ACTION] = {"action": "terminate", "time": zulu(when)}
        assert script.wait_lines(2)["kind"] == "terminate"
        assert worker.drained_until == when.timestamp()
        server.wait_for(server.ACTION, 200)

        server.found[server.REBALANCE] = {"noticeTime": zulu(soon(5))}  # another, and later than what stands
        assert script.wait_lines(3)["drained"] is False
        assert worker.drained_until == when.timestamp()

        assert ray.get(worker.tenant.ping.remote()) == worker.pid  # still runs
        with pytest.raises(ActorUnschedulableError):
            ray.get(worker.new_actor().ping.remote())
        assert list(draining()) == [worker.id] and script.says == []


def test_aws_recommendation_ignored(cluster: Cluster, tmp_path: Path) -> None:
    with AwsMetadata() as server:
        server.found[server.REBALANCE] = {"noticeTime": zulu(soon(0))}
        with watch(tmp_path, server, cluster, None, "aws", "--ignore-rebalance") as script:
            server.wait_for(server.ACTION, 404)
            assert draining() == {} and script.lines == script.says == []


def test_gcp_long_poll(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    with GcpMetadata() as server, watch(tmp_path, server, cluster, worker, "gcp") as script:
        wait_until(lambda: server.held)  # FALSE was read, and the script waits for a change of it
        assert draining() == {} and script.lines == []
        before = time.time()
        server.set(server.PREEMPTED, "TRUE")
        assert script.wait_lines(1)["kind"] == "preempted"
        assert worker.drained_until and before + 30 <= worker.drained_until + 0.001 <= time.time() + 30
        wait_until(lambda: server.held)  # TRUE stays, and is waited on
        assert len(script.lines) == 1 and script.says == []
        waits = [query for _, _, query in server.asked if query]
        assert len(waits) >= 2 and all(
            query.keys() == {"wait_for_change", "timeout_sec", "last_etag"} for query in waits
        )


def test_gcp_maintenance(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    with GcpMetadata() as server:
        server.set(server.MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE")
        before = time.time()
        with watch(tmp_path, server, cluster, worker, "gcp", "--once") as script:
            assert script.process.wait(120) == 0
            assert [line["kind"] for line in script.lines] == ["maintenance"]
            assert worker.drained_until and before + 60 <= worker.drained_until + 0.001 <= time.time() + 60


def test_gcp_needs_the_answers_header(cluster: Cluster, tmp_path: Path) -> None:
    """Another server that says TRUE is not believed; nor is a migration a notice."""
    with GcpMetadata(flavor="Other") as server:
        server.set(server.PREEMPTED, "TRUE")
        with watch(tmp_path, server, cluster, None, "gcp") as script:
            server.wait_for(server.PREEMPTED, 200)
            assert len(script.says) == 1 and "no header Metadata-Flavor" in script.says[0]
            assert draining() == {} and script.lines == []
            server.set(server.PREEMPTED, "FALSE")
            server.set(server.MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE")
            server.flavor = "Google"
            wait_until(lambda: server.held)
            server.set(server.PREEMPTED, "FALSE ")  # ends a long poll; the same value
            server.wait_for(server.MAINTENANCE, 200, more=1)
            assert draining() == {} and script.lines == []
            assert script.says[1:] == [f"spot_notice: the metadata server at {server.url} answers again"]


def test_azure_events(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    when = soon(300)
    with AzureMetadata() as server, watch(tmp_path, server, cluster, worker, "azure") as script:
        server.add("Preempt", "pool_11", format_datetime(when, usegmt=True))  # another VM
        server.add("Freeze", "pool_1", format_datetime(when, usegmt=True))  # ours, and it stays
        server.wait_for(server.EVENTS, 200)
        assert draining() == {} and script.lines == []
        server.add("Preempt", "POOL_1", format_datetime(when, usegmt=True))
        assert script.wait_lines(1)["kind"] == "preempt"
        assert worker.drained_until == when.timestamp()
        server.wait_for(server.EVENTS, 200)
        server.add("Terminate", "pool_1", "")  # has started
        line = script.wait_lines(2)
        assert (line["kind"], line["deadline_seconds"], line["drained"]) == ("terminate", 0, True)
        assert worker.drained_until <= time.time()
        server.wait_for(server.EVENTS, 200)
        assert len(script.lines) == 2 and script.says == []


def test_trouble_then_a_notice(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    """No server, then one that fails, then one that talks nonsense; said once; then no GCS for a while."""
    with AwsMetadata() as server:
        port = server.server_port
    gcs = Forwarder(cluster.address)
    when = zulu(soon(300))
    places = ["--metadata-url", f"http://127.0.0.1:{port}", "--address", f"127.0.0.1:{gcs.port}"]
    options = ["--cloud", "auto", "--every", "0.05", *places, "--node-id", worker.id, "--once"]
    try:
        with Script(tmp_path, "watch", *options) as script:
            wait_until(lambda: len(script.says) == 2)
            assert "Ray cannot be reached yet" in script.says[0]
            assert "no cloud's metadata server found" in script.says[1]
            with AwsMetadata(port) as server:
                server.failure = (503, "")
                server.wait_for(server.TOKEN, 503, more=2)
                server.found[server.ACTION] = '{"action": "terminate"'
                server.failure = None
                server.wait_for(server.ACTION, 200, more=2)
                assert script.lines == []
                assert len(script.says) == 2
                server.found[server.ACTION] = {"action": "stop", "time": when}
                wait_until(lambda: len(script.says) == 4)
                assert "answers again" in script.says[2]
                assert "aws stop: Ray cannot be reached" in script.says[3]
                server.wait_for(server.ACTION, 200)
                assert script.lines == [] and draining() == {} and len(script.says) == 4
                gcs.open()
                assert script.process.wait(120) == 0
                assert script.wait_lines(1)["kind"] == "stop"
                assert (
                    worker.drained_until is not None and zulu(datetime.fromtimestamp(worker.drained_until, UTC)) == when
                )
    finally:
        gcs.close()


@pytest.mark.parametrize("kind", [AwsMetadata, GcpMetadata, AzureMetadata])
def test_servers_refuse_and_the_script_says_so(kind: type[Metadata], cluster: Cluster, tmp_path: Path) -> None:
    with kind() as server:
        path = {AwsMetadata: AwsMetadata.ACTION, GcpMetadata: GcpMetadata.PREEMPTED, AzureMetadata: AzureMetadata.NAME}[
            kind
        ]
        plain = http.client.HTTPConnection("127.0.0.1", server.server_port)
        plain.request("GET", path)  # without the cloud's header
        status = plain.getresponse().status
        plain.close()
        assert status == {AwsMetadata: 401, GcpMetadata: 403, AzureMetadata: 400}[kind]
        cloud = kind.__name__.removesuffix("Metadata").lower()
        server.failure = (status, "")
        with watch(tmp_path, server, cluster, None, cloud) as script:
            wait_until(lambda: len(server.answered) >= 4)
            assert len(script.says) == 1 and f"answered '{status}'" in script.says[0]
            assert script.lines == [] and draining() == {}


@pytest.mark.parametrize("kind", [GcpMetadata, AzureMetadata])
def test_auto_finds_the_cloud(kind: type[Metadata], cluster: Cluster, tmp_path: Path) -> None:
    with kind() as server, watch(tmp_path, server, cluster, None, "auto") as script:
        if isinstance(server, GcpMetadata):
            wait_until(lambda: server.held)
        else:
            server.wait_for(AzureMetadata.EVENTS, 200)
        assert script.says == script.lines == [] and draining() == {}


def test_now(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    """At once without --wait; with it, until the deadline or until the actors are gone."""
    env = environment(RAY_ADDRESS=cluster.address, RAY_NODE_IP="127.0.0.2")  # finds both itself
    before = time.time()
    with Script(tmp_path, "now", "--deadline", "60", env=env) as script:
        assert script.process.wait(120) == 0
        line = script.wait_lines(1)
        assert (line["cloud"], line["node_id"], line["drained"]) == ("none", worker.id, True)
    assert worker.drained_until and before + 60 <= worker.drained_until + 0.001 <= time.time() + 60
    with Script(tmp_path, "now", "--deadline", "1", "--wait", env=env) as script:
        assert script.process.wait(120) == 0 and script.says == []
    assert worker.alive() and ray.get(worker.tenant.ping.remote()) == worker.pid
    with Script(tmp_path, "now", "--deadline", "500", "--wait", env=env) as script:
        assert script.wait_lines(1)["drained"] is False
        assert script.process.poll() is None
        ray.kill(worker.tenant)
        assert script.process.wait(120) == 0
    wait_until(lambda: not worker.alive())


def test_now_without_a_gcs(tmp_path: Path) -> None:
    arguments = ["now", "--deadline", "6", "--wait", "--address", NOWHERE]  # longer than a first try on a busy machine
    with Script(tmp_path, *arguments) as script:
        assert script.process.wait(120) == 1
        assert ["trying on" in line for line in script.says] == [True, False] and script.lines == []


def test_which_node(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    """Several nodes of one host are told apart by --node-id alone; an id must be an alive node's."""
    arguments = ["now", "--deadline", "60", "--address", cluster.address]
    head = cluster.head_node.node_id
    with Script(tmp_path, *arguments) as script:
        assert script.process.wait(120) == 2
        assert len(script.says) == 1 and "--node-id" in script.says[0]
        assert f"{head} (127.0.0.1)" in script.says[0] and f"{worker.id} (127.0.0.2)" in script.says[0]
    near = ("0" if worker.id[0] != "0" else "1") + worker.id[1:]
    with Script(tmp_path, *arguments, "--node-id", near) as script:
        assert script.process.wait(120) == 2
        assert script.says == [f"spot_notice: --node-id: no alive Ray node is {near}; did you mean {worker.id}?"]
    with AwsMetadata() as server, Script(tmp_path, "watch", *arguments[3:], "--metadata-url", server.url) as script:
        assert script.process.wait(120) == 2 and "several alive Ray nodes" in script.says[0]
    assert draining() == {}


def test_addresses_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import ray_node

    assert ray_node.is_local("127.0.0.1") and ray_node.is_local("127.0.0.2")
    assert not any(ray_node.is_local(other) for other in ("203.0.113.77", "2001:db8::77", "no address"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "Missing command"),
        (["wach"], "watch"),
        (["watch", "--cloud", "awz"], "'aws'"),
        (["watch", "--every", "0"], "--every"),
        (["watch", "--every", "nan"], "--every"),
        (["watch", "--metadata-url", "https://127.0.0.1"], "http://169.254.169.254"),
        (["watch", "--metadata-url", "http://127.0.0.1:99999"], "--metadata-url"),
        (["now"], "--deadline"),
        (["now", "--deadline", "inf"], "--deadline"),
        (["now", "--deadline", "-1"], "--deadline"),
        (["now", "--deadline", "1", "--address", "ray://127.0.0.1:1"], "HOST:PORT"),
        (["now", "--deadline", "1", "--address", "127.0.0.1:99999"], "--address"),
        (["now", "--deadline", "1", "--node-id", "xyz"], "56 digits"),
    ],
)
def test_bad_input(arguments: list[str], word: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and word in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["watch", "--help"], ["now", "--help"]])
def test_help(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Example: spot_notice.py" in done.stdout


WITH_TOKEN = """
import sys
from ray.cluster_utils import Cluster
from ray._raylet import GcsClient
head = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    print(cluster.address, cluster.head_node.node_id, flush=True)
    for line in sys.stdin:
        info, = GcsClient(address=cluster.address).get_all_node_info().values()
        print(info.state, info.death_info.reason, flush=True)
finally:
    cluster.shutdown()
"""


def node_state(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().split()


def test_token_authentication(tmp_path: Path) -> None:
    """A Ray that demands a token gets it from Ray's variables; without it, or with another, the script is refused."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    home = environment(HOME=str(tmp_path), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    home = {name: value for name, value in home.items() if not name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-c", WITH_TOKEN]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=home | token, **pipes) as process:
        assert process.stdin and process.stdout
        address, node_id = process.stdout.readline().split()
        arguments = ["now", "--deadline", "60", "--address", address]
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, token | {"RAY_AUTH_TOKEN": "f" * 32}, {"RAY_AUTH_MODE": "token"}):
            with Script(tmp_path, *arguments, env=home | wrong) as script:
                assert script.process.wait(120) == 1
                assert len(script.says) == 1 and "Ray refuses this process" in script.says[0]
                assert "0123456789abcdef" not in script.err.read_text() and "f" * 32 not in script.err.read_text()
        assert node_state(process) == ["0", "0"]  # alive: none of these drained it

        (tmp_path / ".ray").mkdir()  # the file that `ray start` takes up by itself
        (tmp_path / ".ray" / "auth_token").write_text(token["RAY_AUTH_TOKEN"])
        with Script(tmp_path, *arguments, env=home) as script:
            assert script.process.wait(120) == 0 and script.wait_lines(1)["node_id"] == node_id
        # Drained and idle, the node leaves.
        wait_until(lambda: node_state(process) == ["1", str(NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)])
        process.stdin.close()
    assert process.returncode == 0
