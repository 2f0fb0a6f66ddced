"""The cluster's files say the same thing to every launcher: spot scorers, tokens, fast health checks, drained nodes."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped_cluster import CLUSTER, HEALTH, system_config

ROOT = Path(__file__).parents[2]
LAUNCHERS = ["aws", "gcp"]
BRIDGE = "cluster/spot_notice.py"


def launcher(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return tree


def kuberay(name: str) -> dict[str, Any]:
    """Return the RayCluster's spec in a manifest."""
    spec: dict[str, Any] = list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))[-1]["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


MANIFESTS = {name: kuberay(name) for name in ("raycluster", "rayjob", "rayservice")}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_head_and_trainers_are_bought_and_scorers_are_spot_of_two_kinds(name: str) -> None:
    tree = launcher(name)
    types = tree["available_node_types"]
    markets = {node: types[node]["labels"]["ray.io/market-type"] for node in types}
    assert markets[tree["head_node_type"]] == markets["trainer"] == "on-demand"
    assert "GPU" not in types[tree["head_node_type"]]["resources"]
    spot = [node for node, market in markets.items() if market == "spot"]
    assert len({types[node]["labels"]["ray.io/accelerator-type"] for node in spot}) >= 2
    assert all(node.startswith("spot_") == (node in spot) for node in types)  # the bridge's command goes by the name
    assert all(0 <= node["min_workers"] <= node["max_workers"] for node in types.values())
    assert sum(node["max_workers"] for node in types.values()) == tree["max_workers"]
    assert tree["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", LAUNCHERS)
def test_start_commands(name: str) -> None:
    tree = launcher(name)
    head, workers = tree["head_start_ray_commands"], tree["worker_start_ray_commands"]
    for command in head + workers:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "ray start" in command or BRIDGE in command:
            assert command.index("RAY_AUTH_MODE=token") < command.index(BRIDGE if BRIDGE in command else "ray start")
    assert "--dashboard-host=127.0.0.1" in head[-1] and "0.0.0.0" not in str(head + workers)
    assert not any(BRIDGE in command for command in head)
    assert system_config(name) == HEALTH
    assert list(tree["file_mounts"]) == ["/home/ray/.ray/auth_token"]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(("node", "starts"), [("spot", True), ("trainer", False), ("head", False), ("", False)])
def test_the_bridge_starts_on_spot_machines_only_and_once(name: str, node: str, starts: bool, tmp_path: Path) -> None:
    """The shipped command runs in bash with the autoscaler's name of the node; only the bridge itself is another."""
    tree = launcher(name)
    if node == "spot":
        node = next(key for key in tree["available_node_types"] if key.startswith("spot_"))
    (command,) = [command for command in tree["worker_start_ray_commands"] if BRIDGE in command]
    bridge = f"python {BRIDGE} watch --cloud {name}"
    assert bridge in command
    for old, new in {
        bridge: "bash -c 'echo started >> started; until [ -e stop ]; do sleep 0.05; done'",
        "/opt/raydmd": str(tmp_path),
        "/tmp/spot_notice": str(tmp_path / "spot_notice"),
    }.items():
        assert old in command
        command = command.replace(old, new)
    # One of the two finds the lock taken and ends; `wait -n` would miss it had it ended before being asked for.
    one_left = 'while [ "$(jobs -rp | wc -l)" -gt 1 ]; do sleep 0.05; done'
    script = f"{command.strip()}\n{command.strip()}\n{one_left}\ntouch {tmp_path}/stop\nwait\n"
    environment = {"RAY_NODE_TYPE_NAME": node, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=180)
    assert done.returncode == 0
    started = tmp_path / "started"
    assert (started.read_text() if started.exists() else "") == ("started\n" if starts else "")


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str) -> None:
    spec = MANIFESTS[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    head = spec["headGroupSpec"]
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    environment = {entry["name"]: entry["value"] for entry in head["template"]["spec"]["containers"][0]["env"]}
    assert environment == {f"RAY_{key}": str(value) for key, value in HEALTH.items()}
    groups = spec["workerGroupSpecs"]
    assert {group["labels"]["ray.io/market-type"] for group in groups} == {"spot", "on-demand"}
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        spot = group["labels"]["ray.io/market-type"] == "spot"
        assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == spot, group["groupName"]
        assert any(t["key"] == "cloud.google.com/gke-spot" for t in pod["tolerations"]) == spot
        assert "nvidia.com/gpu" in container["resources"]["limits"]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])[-1]
        if spot:
            assert f"python /opt/raydmd/{BRIDGE} now --deadline 30" in hook, group["groupName"]
        if hook:
            (pause,) = re.findall(r"--deadline (\d+) --wait$", hook.strip())
            assert int(pause) < pod["terminationGracePeriodSeconds"], "the hook must end before the pod is killed"
    for group in (head, *groups):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        for container in pod["containers"]:
            assert container["securityContext"]["runAsNonRoot"] is True


def test_two_kinds_of_spot_gpu_in_the_standing_cluster() -> None:
    groups = MANIFESTS["raycluster"]["workerGroupSpecs"]
    spot = [group["labels"] for group in groups if group["labels"]["ray.io/market-type"] == "spot"]
    assert len({labels["ray.io/accelerator-type"] for labels in spot}) >= 2
    assert MANIFESTS["raycluster"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_one_image_and_one_version_of_ray() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", dockerfile, re.MULTILINE)
    assert {spec["rayVersion"] for spec in MANIFESTS.values()} == {version}
    texts = [path.read_text() for path in CLUSTER.glob("**/*.yaml")]
    images = {image for text in texts for image in re.findall(r"image: (\S+)", text)}
    assert images == {"YOUR_REGISTRY/raydmd:latest"}


def test_dockerfile() -> None:
    lines = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    words = [name for name, _ in steps]
    assert words[words.index("FROM") :][0] == "FROM" and set(words[: words.index("FROM")]) == {"ARG"}
    base = dict(steps)["FROM"]
    assert re.fullmatch(r"rayproject/ray:\$\{RAY_VERSION\}-\$\{PLATFORM\}", base)
    assert re.search(r"^ARG PLATFORM=py312-cu\d+$", "\n".join(lines), re.MULTILINE)
    assert [rest for name, rest in steps if name == "USER"] == ["ray"]
    copied = [rest.split() for name, rest in steps if name == "COPY"]
    sources = [word for parts in copied for word in parts[1:-1]]
    assert all((ROOT / source).exists() for source in sources) and {"cluster", "jobs", "raydmd"} <= set(sources)
    targets = {parts[-1] for parts in copied}
    assert {"/opt/raydmd/cluster", "/opt/raydmd/jobs"} <= targets  # where manifests and launchers look for them


def test_the_package_carries_its_schemas() -> None:
    schemas = sorted((ROOT / "raydmd/schemas/kuberay").glob("*.json"))
    assert [path.stem for path in schemas] == ["raycluster", "rayjob", "rayservice"]
    assert all(json.loads(path.read_text())["type"] == "object" for path in schemas)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert not any("json" in line or "schemas" in line for line in ignored)  # hatchling leaves ignored files out
