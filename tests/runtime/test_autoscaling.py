"""Ray's own autoscaler: pending actors make labelled nodes appear, idle nodes go, and a run distils on them."""

import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from autoscaling import autoscaling_cluster
from jsonschema import ValidationError
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from rich.console import Console
from test_runtime import assert_same_bits, placed, reference, wait_until

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.runs.run import Run
from raydmd.runtime.launch import distill

MARKET = "ray.io/market-type"
SPOT, ON_DEMAND = {MARKET: "spot"}, {MARKET: "on-demand"}


def sit(**options: Any) -> Any:
    """Start an actor of one CPU that only says where it is."""

    class Sitter:  # in here, so that it travels by value: the workers do not have this file
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    return ray.remote(Sitter).options(num_cpus=1, **options).remote()


def markets() -> list[str]:
    """The market type of every living node, sorted; a head has none."""
    return sorted(node["Labels"].get(MARKET, "") for node in ray.nodes() if node["Alive"])


def labels_of(node_id: str) -> dict[str, str]:
    return next(node["Labels"] for node in ray.nodes() if node["NodeID"] == node_id)


def infeasible(address: str) -> list[dict[str, str]]:
    """What the autoscaler says that no node type can offer: the label selectors, as it last reported them."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address).get_cluster_status())
    return [
        {constraint.label_key: ",".join(constraint.label_values) for constraint in selector.label_constraints}
        for request in reply.autoscaling_state.infeasible_resource_requests
        for selector in request.label_selectors
    ]


def join(address: str) -> None:
    ray.init(address=address, log_to_driver=False, configure_logging=False)


def test_a_node_comes_for_a_label_and_goes_when_idle() -> None:
    types = {
        "cpu-on-demand": {"resources": {"CPU": 1}, "labels": ON_DEMAND, "max_workers": 2},
        "cpu-spot": {"resources": {"CPU": 1, "spot": 1}, "labels": SPOT, "max_workers": 2},
    }
    with autoscaling_cluster({"CPU": 1}, types) as address:
        join(address)
        assert markets() == [""]
        actor = sit(label_selector=SPOT)
        node = ray.get(actor.node.remote(), timeout=180)
        assert labels_of(node)[MARKET] == "spot"
        assert markets() == ["", "spot"]  # one actor, one node; the other type is left alone
        ray.kill(actor)
        wait_until(lambda: markets() == [""])
        gone = next(found for found in ray.nodes() if found["NodeID"] == node)
        assert "idle" in gone["DeathReasonMessage"]  # the autoscaler ended it, it did not crash


def test_a_fallback_is_taken_where_no_type_offers_the_label_and_nothing_outlives_a_failure() -> None:
    types = {"cpu-on-demand": {"resources": {"CPU": 1}, "labels": ON_DEMAND, "max_workers": 2}}
    processes: list[psutil.Process] = []
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ZeroDivisionError), autoscaling_cluster({"CPU": 1}, types) as address:
        join(address)
        lost = sit(label_selector=SPOT)  # no fallback: no node comes for it
        wait_until(lambda: SPOT in infeasible(address))
        assert markets() == [""]
        ray.kill(lost)
        actor = sit(label_selector=SPOT, fallback_strategy=[{"label_selector": ON_DEMAND}])
        assert labels_of(ray.get(actor.node.remote(), timeout=180))[MARKET] == "on-demand"
        assert markets() == ["", "on-demand"]
        processes += [process for process in psutil.Process().children(recursive=True) if process not in before]
        names = [process.name() for process in processes]
        assert names.count("raylet") == 2 and names.count("gcs_server") == 1
        raise ZeroDivisionError
    assert [process for process in processes if alive(process)] == []
    host, _, port = address.partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_node_type_that_ray_would_refuse_starts_nothing() -> None:
    before = psutil.Process().children()
    with pytest.raises(ValidationError, match="max_worker'"):
        with autoscaling_cluster({"CPU": 1}, {"cpu": {"resources": {"CPU": 1}, "max_worker": 2}}):
            raise AssertionError("it started")
    assert psutil.Process().children() == before


@pytest.mark.ray_private
def test_a_run_distils_on_nodes_that_come_for_it(
    quick, prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has room for the trainers alone; each teacher asks for a spot node that is not there yet."""
    recipe = quick(
        "digits", "runtime.generator.cpus=0.5", "runtime.fake.cpus=0.5",
        f"runtime.teacher={{max_workers: 2, cpus: 3, labels: {{{MARKET}: spot}}}}",
    )  # fmt: skip
    types = {"cpu-spot": {"resources": {"CPU": 3}, "labels": SPOT, "max_workers": 2}}
    with autoscaling_cluster({"CPU": 3}, types, idle_timeout_minutes=1.0) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert distill(recipe, tmp_path / "run", console=Console(quiet=True))
        at = placed("TeacherWorker")
        assert 1 <= sum(at.values()) <= 2  # a run may begin before the second is up, and end before it joins
        assert all(labels_of(node)[MARKET] == "spot" for node in at)
        assert all(MARKET not in labels_of(node) for role in ("Generator", "Fake") for node in placed(f"{role}Worker"))
    started = next(event for event in Run(tmp_path / "run").events() if event["event"] == "started")
    assert started["workers"].keys() == {"teacher", "fake", "generator"}
    assert all(count >= 1 for count in started["workers"].values())
    experts = reference(recipe, prompts)
    assert_same_bits(tmp_path / "run", experts)
    with pytest.raises(AssertionError):
        assert_same_bits(tmp_path / "run", reference(recipe.model_copy(update={"seed": 1}), prompts))
