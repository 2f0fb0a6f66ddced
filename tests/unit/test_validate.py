"""`raydmd validate`: what ships is right, and a typo anywhere is refused with its path and the nearest right key."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydmd.cli import app, run
from raydmd.config.recipe import dump_recipe, shipped_recipes
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.validation import validate_file
from raydmd.validation.document import check_schema, closed, with_defaults

ROOT = Path(__file__).parents[2]
FILES = {
    "aws": ROOT / "cluster/aws.yaml",
    "gcp": ROOT / "cluster/gcp.yaml",
    "raycluster": ROOT / "cluster/kuberay/raycluster.yaml",
    "rayjob": ROOT / "cluster/kuberay/rayjob.yaml",
    "rayservice": ROOT / "cluster/kuberay/rayservice.yaml",
    "recipe": ROOT / "jobs/recipes/digits.yaml",
}
KIND = {"aws": "cluster launcher", "gcp": "cluster launcher", "raycluster": "RayCluster; PersistentVolumeClaim skipped",
        "rayjob": "RayJob; PersistentVolumeClaim skipped", "rayservice": "RayService", "recipe": "recipe"}  # fmt: skip
POD = "template.spec"
WORKER = f"spec.workerGroupSpecs.1.{POD}"
IN_JOB = f"spec.rayClusterSpec.workerGroupSpecs.1.{POD}"

# file, the key's path, its misspelling, the key that the refusal must propose
TYPOS = [
    ("aws", "available_node_types", "avaliable_node_types", "available_node_types"),
    ("aws", "cluster_name", "cluster_nam", "cluster_name"),
    ("aws", "provider.availability_zone", "availabilty_zone", "availability_zone"),
    ("aws", "docker.container_name", "container_nmae", "container_name"),
    ("aws", "available_node_types.trainer.max_workers", "max_worker", "max_workers"),
    ("aws", "available_node_types.spot_a10g.node_config", "nodeconfig", "node_config"),
    ("aws", "available_node_types.spot_a10g.resources.GPU", "GPUs", "GPU"),
    ("aws", "available_node_types.spot_a10g.resources.GPU", "gpu", "GPU"),
    (
        "aws", "available_node_types.spot_a10g.node_config.InstanceMarketOptions", "InstanceMarketOption",
        "InstanceMarketOptions",
    ),
    ("aws", "available_node_types.spot_a10g.labels.ray.io/market-type", "ray.io/market-typ", "ray.io/market-type"),
    ("gcp", "head_node_type", "head_nod_type", "head_node_type"),
    ("gcp", "provider.project_id", "projectid", "project_id"),
    ("gcp", "available_node_types.spot_t4.labels", "label", "labels"),
    ("gcp", "available_node_types.spot_t4.node_config.guestAccelerators", "guestAccelerator", "guestAccelerators"),
    ("gcp", "worker_start_ray_commands", "worker_start_ray_command", "worker_start_ray_commands"),
    ("raycluster", "spec", "spce", "spec"),
    ("raycluster", "apiVersion", "apiVersoin", "apiVersion"),
    ("raycluster", "metadata.name", "nmae", "name"),
    ("raycluster", "spec.headGroupSpec.rayStartParams", "rayStartParam", "rayStartParams"),
    ("raycluster", "spec.headGroupSpec.rayStartParams.dashboard-host", "dashboard-hots", "dashboard-host"),
    ("raycluster", "spec.workerGroupSpecs.1.minReplicas", "minReplica", "minReplicas"),
    ("raycluster", "spec.workerGroupSpecs.2.labels.ray.io/market-type", "ray.io/markettype", "ray.io/market-type"),
    ("raycluster", "spec.autoscalerOptions.idleTimeoutSeconds", "idleTimeoutSecond", "idleTimeoutSeconds"),
    ("raycluster", f"{WORKER}.terminationGracePeriodSeconds", "gracePeriodSeconds", "terminationGracePeriodSeconds"),
    ("raycluster", f"{WORKER}.containers.0.lifecycle.preStop", "prestop", "preStop"),
    ("raycluster", f"{WORKER}.containers.0.resources.limits", "limit", "limits"),
    ("rayjob", "spec.entrypoint", "entryPoint", "entrypoint"),
    ("rayjob", "spec.rayClusterSpec", "rayClusterSpecs", "rayClusterSpec"),
    ("rayjob", "spec.shutdownAfterJobFinishes", "shutdownAfterJobFinish", "shutdownAfterJobFinishes"),
    ("rayjob", f"{IN_JOB}.tolerations.0.operator", "operater", "operator"),
    ("rayjob", f"{IN_JOB}.volumes.0.persistentVolumeClaim.claimName", "claimname", "claimName"),
    ("rayservice", "spec.serveConfigV2", "serveConfig", "serveConfigV2"),
    ("rayservice", "spec.rayClusterConfig.authOptions.mode", "mod", "mode"),
    ("recipe", "teacher", "techer", "teacher"),
    ("recipe", "batch.micro", "micr", "micro"),
    ("recipe", "runtime.teacher.labels", "label", "labels"),
    ("recipe", "optimizer.fake.betas", "beta", "betas"),
    ("recipe", "method.regression.weight", "weigth", "weight"),
]  # fmt: skip

# file, a key's path, a wrong value, words of the refusal
VALUES = [
    ("aws", "provider.type", "awz", ["provider"]),
    ("aws", "max_workers", "many", ["max_workers", "integer"]),
    ("aws", "head_node_type", "haed", ["head_node_type", "did you mean 'head'?"]),
    ("aws", "available_node_types.trainer.min_workers", 3, ["trainer.min_workers (3)", "max_workers (2)"]),
    ("aws", "max_workers", 0, ["max_workers"]),
    ("aws", "available_node_types.trainer.resources.GPU", "8", ["resources.GPU", "integer"]),
    ("aws", "available_node_types.trainer.labels.ray.io/market-type", "on-demnd", ["did you mean 'on-demand'?"]),
    ("aws", "available_node_types.trainer.labels.ray.io/market-type", "spot", ["market-type", "on-demand machines"]),
    ("gcp", "available_node_types.spot_l4.labels.ray.io/market-type", "on-demand", ["market-type", "spot machines"]),
    ("gcp", "available_node_types.spot_l4.labels.role", "a b", ["labels.role"]),
    ("aws", "head_start_ray_commands.1", "ray start --haed", ["commands[1]", "--haed", "did you mean '--head'?"]),
    ("aws", "head_start_ray_commands.1", "x; ray start --system-config='{a: 1}'; y --z", ["--system-config", "JSON"]),
    ("aws", "worker_start_ray_commands.0", "ray start 'a", ["worker_start_ray_commands[0]", "not a shell command"]),
    ("aws", "available_node_types.spot_a10g.node_config.InstanceMarketOptions", "spot", ["on-demand machines"]),
    ("aws", "file_mounts./home/ray/.ray/auth_token", None, ["file_mounts", "path"]),
    ("raycluster", "kind", [], ["kind"]),
    ("raycluster", "spec.headGroupSpec.template", {}, ["headGroupSpec.template", "'spec' is missing"]),
    ("rayjob", "spec.rayClusterSpec", {}, ["rayClusterSpec"]),
    ("raycluster", "kind", "RayClutser", ["kind", "did you mean 'RayCluster'?"]),
    ("raycluster", "apiVersion", "ray.io/v1alpha1", ["apiVersion", "ray.io/v1"]),
    ("raycluster", "metadata", {}, ["metadata", "'name' is missing"]),
    ("raycluster", "spec.authOptions.mode", "tokens", ["spec.authOptions.mode", "did you mean 'token'?"]),
    ("raycluster", "spec.workerGroupSpecs.1.minReplicas", 9, ["minReplicas (9)", "maxReplicas (8)"]),
    ("raycluster", "spec.workerGroupSpecs.1.minReplicas", "1", ["minReplicas", "integer"]),
    ("raycluster", "spec.workerGroupSpecs.2.groupName", "spot-l4", ["workerGroupSpecs[2].groupName", "spot-l4"]),
    ("raycluster", f"{WORKER}.containers.0.resources.limits.memory", "24GiB", ["limits.memory"]),
    ("raycluster", f"{WORKER}.containers.0.volumeMounts.0.name", "run", ["no volume 'run'", "did you mean 'runs'?"]),
    ("raycluster", f"{WORKER}.containers", [], ["containers"]),
    ("rayjob", "spec.entrypoint", "python jobs/distill.py digit", ["entrypoint", "did you mean 'digits'?"]),
    ("rayjob", "spec.entrypoint", "python jobs/distil.py digits", ["entrypoint", "did you mean 'distill'?"]),
    ("rayjob", "spec.entrypoint", "raydmd distill digits --set batch.sice=8", ["batch.sice", "did you mean 'size'?"]),
    ("rayjob", "spec.entrypoint", "raydmd distill digits --resum never", ["entrypoint", "--resum"]),
    ("rayjob", "spec.entrypoint", "raydmd distill 'digits", ["entrypoint", "shell"]),
    ("rayjob", "spec.runtimeEnvYAML", "env_var: {A: b}", ["runtimeEnvYAML.env_var", "did you mean 'env_vars'?"]),
    ("rayjob", "spec.runtimeEnvYAML", "env_vars: {A: 1}", ["runtimeEnvYAML.env_vars.A", "string"]),
    ("rayservice", "spec.serveConfigV2", "applications: [{import_pth: a:b}]", ["did you mean 'import_path'?"]),
    ("rayservice", "spec.serveConfigV2", "applications: [{import_path: a}]", ["serveConfigV2", "import_path"]),
    ("rayservice", "spec.serveConfigV2", "applications: [{import_path: a:b, deployments: [{name: x, num_replica: 2}]}]",
     ["deployments[0].num_replica", "did you mean 'num_replicas'?"]),
    ("rayservice", "spec.serveConfigV2", "http_options: {prt: 1}\napplications: []", ["http_options.prt"]),
    ("rayservice", "spec.serveConfigV2",
     "applications: [{import_path: 'raydmd.serving.app:build', args: {run: /runs/digits, layuot: pipelined}}]",
     ["serveConfigV2.applications[0].args", "unknown key 'layuot'", "did you mean 'layout'?"]),
    ("recipe", "batch.micro", 3, ["batch.micro"]),
    ("recipe", "runtime.teacher.cpus", "one", ["runtime.teacher.cpus"]),
]  # fmt: skip


def tree(name: str) -> list[Any]:
    if name == "recipe":
        return [yaml.safe_load(dump_recipe(load_recipe("digits")))]  # every key there is
    return list(yaml.safe_load_all(FILES[name].read_text()))


def parent(documents: list[Any], path: str) -> tuple[Any, Any]:
    """Return the container of the last document's ``path`` and the last key; keys may have dots."""
    node, words = documents[-1], path.split(".")
    while True:
        if isinstance(node, list):
            key: Any = int(words.pop(0))
        else:
            count = next(n for n in range(len(words), 0, -1) if ".".join(words[:n]) in node)
            key, words = ".".join(words[:count]), words[count:]
        if not words:
            return node, key
        node = node[key]


def write(documents: list[Any], folder: Path) -> Path:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump_all(copy.deepcopy(documents), sort_keys=False))
    return path


def refused(path: Path, capsys: Any) -> str:
    assert run(["validate", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"raydmd: {path}: "), err
    return err


@pytest.mark.parametrize("name", FILES)
def test_what_ships_is_right_written_by_hand_or_dumped(name: str, tmp_path: Path, capsys: Any) -> None:
    written = write(tree(name), tmp_path)  # the changes below start from here
    assert run(["validate", str(FILES[name]), str(written)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [f"ok {FILES[name]} ({KIND[name]})", f"ok {written} ({KIND[name]})"]


def test_all_shipped_files_at_once(capsys: Any) -> None:
    files = [*sorted(ROOT.glob("cluster/**/*.yaml")), *sorted(ROOT.glob("jobs/**/*.yaml"))]
    assert {*FILES.values(), *shipped_recipes().values()} <= set(files)
    papers = {path for path in shipped_recipes().values() if "\n    latent_shape:" in path.read_text() or
              "family: edm" in path.read_text()}  # fmt: skip
    assert run(["validate", *map(str, papers)]) == 2  # teachers and prompts that only their user has
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == len(papers)
    assert all(": prompts.path: " in line or ": teacher.path: " in line for line in told.err.splitlines())
    files = [path for path in files if path not in papers]
    assert run(["validate", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files) and sum("Prometheus" in line for line in lines) == 2


@pytest.mark.parametrize(("name", "path", "wrong", "right"), TYPOS)
def test_a_misspelt_key(name: str, path: str, wrong: str, right: str, tmp_path: Path, capsys: Any) -> None:
    documents = tree(name)
    node, key = parent(documents, path)
    renamed = {wrong if old == key else old: value for old, value in node.items()}
    node.clear()
    node.update(renamed)
    line = refused(write(documents, tmp_path), capsys)
    assert wrong in line and f"did you mean '{right}'?" in line, line
    above = path.removesuffix(key).rstrip(".").split(".")[-1]
    assert above in line or above.isdigit(), line


@pytest.mark.parametrize(("name", "path", "value", "words"), VALUES)
def test_a_wrong_value(name: str, path: str, value: Any, words: list[str], tmp_path: Path, capsys: Any) -> None:
    documents = tree(name)
    if path == "spec.runtimeEnvYAML":
        documents[-1]["spec"]["runtimeEnvYAML"] = ""
    node, key = parent(documents, path)
    node[key] = value
    line = refused(write(documents, tmp_path), capsys)
    assert all(word in line for word in words), line


RIGHT = [
    ("aws", "available_node_types.trainer.resources", {"CPU": 96, "GPU": 8, "fast_disk": 1}),
    ("aws", "provider", {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}),
    ("gcp", "available_node_types.spot_l4.node_config.scheduling", [{"preemptible": True}]),
    ("raycluster", f"{WORKER}.containers.0.resources.limits.cpu", 6),
    ("raycluster", "spec.workerGroupSpecs.1.labels", {"my.org/zone": "a"}),
    ("rayjob", "spec.entrypoint", "python /opt/raydmd/jobs/pretrain.py /runs/mine.yaml --out /runs/teacher"),
    ("rayjob", "spec.entrypoint", "python train.py digit --anything"),
    ("rayjob", "spec.entrypoint", "raydmd distill digits --set batch.size=128 --resume auto"),
]


@pytest.mark.parametrize(("name", "path", "value"), RIGHT)
def test_what_is_unusual_and_right(name: str, path: str, value: Any, tmp_path: Path, capsys: Any) -> None:
    documents = tree(name)
    node, key = parent(documents, path)
    node[key] = value
    if value == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}:
        for word in ("available_node_types", "head_node_type", "max_workers"):  # Ray makes these of the addresses
            documents[-1].pop(word)
    assert run(["validate", str(write(documents, tmp_path))]) == 0, capsys.readouterr().err


def test_every_file_is_checked_and_each_wrong_one_has_a_line(tmp_path: Path, capsys: Any) -> None:
    for name, text in {
        "list": "- 1",
        "empty": "",
        "tabs": "a:\n\t- b",
        "other": "x: 1\ny: 2",
        "twice": "seed: 1\nseed: 2",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    names = ["list", "empty", "missing", "tabs", "other", "twice"]
    files = [str(tmp_path / f"{name}.yaml") for name in names]
    assert run(["validate", files[0], str(FILES["aws"]), *files[1:], str(FILES["recipe"])]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"ok {FILES['aws']} (cluster launcher)", f"ok {FILES['recipe']} (recipe)"]
    said = dict(zip(names, err.splitlines(), strict=True))
    assert all(line.startswith(f"raydmd: {tmp_path / name}.yaml: ") for name, line in said.items()), err
    words = {"list": "mapping", "empty": "nothing", "missing": "No such file", "tabs": "not readable as YAML",
             "other": "neither", "twice": "line 2: key 'seed' is given twice"}  # fmt: skip
    assert all(words[name] in line for name, line in said.items()), err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, []),
        ({"http_optoins": {}}, ["unknown key 'http_optoins'", "http_options"]),
        ({"http_options": {"prt": 1}}, ["unknown key 'http_options.prt'", "port"]),
        ({"applications": [{"import_path": "raydmd.serving.app:build", "args": {"run": "r", "max_batch": 0}}]},
         ["applications[0].args: max_batch"]),
    ],
)  # fmt: skip
def test_a_serve_configuration(wrong: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    application = {"name": "raydmd", "import_path": "raydmd.serving.app:build", "args": {"run": "runs/digits"}}
    tree = {"proxy_location": "EveryNode", "http_options": {"port": 8000}, "applications": [application]}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(tree | wrong))
    if not wrong:
        assert validate_file(file, app.commands) == "Serve configuration"
        return
    with pytest.raises(UserError) as error:
        validate_file(file, app.commands)
    assert all(word in str(error.value) for word in [str(file), *words]), error.value


def test_other_objects_are_skipped_by_name_and_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\nanything: {goes: 1}\n"
    path.write_text(f"{secret}---\n---\n{FILES['raycluster'].read_text()}")
    assert validate_file(path, app.commands) == "RayCluster; Secret, PersistentVolumeClaim skipped"
    path.write_text(secret)
    assert validate_file(path, app.commands) == "Secret skipped"


SCHEMA = {
    "type": "object",
    "properties": {
        "closed": {"type": "object", "properties": {"a": {"type": "integer", "default": 1}}, "required": ["a"]},
        "map": {"type": "object", "additionalProperties": {"type": "string"}},
        "free": {
            "type": "object", "properties": {"a": {"type": "integer"}},
            "x-kubernetes-preserve-unknown-fields": True,
        },
        "either": {"x-kubernetes-int-or-string": True},
        "maybe": {"type": "string", "nullable": True},
        "list": {"type": "array", "items": {"type": "object", "properties": {"default": {"type": "string"}}}},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"closed": {}}, None),
        ({"closed": {"b": 1}}, "unknown key 'closed.b'"),
        ({"map": {"x": "y"}}, None),
        ({"map": {"x": 1}}, "map.x"),
        ({"free": {"b": 1}}, None),
        ({"free": {"a": "1"}}, "free.a"),
        ({"either": 1}, None),
        ({"either": "1"}, None),
        ({"either": [1]}, "either: a list is not of type integer or string"),
        ({"maybe": None}, None),
        ({"maybe": 1}, "maybe"),
        ({"list": [{"default": "x"}]}, None),
        ({"list": [{}, {"defaults": "x"}]}, "unknown key 'list[1].defaults'; did you mean 'default'?"),
    ],
)
def test_closed_schemas_keep_what_kubernetes_means(value: Any, words: str | None) -> None:
    if words is None:
        check_schema(with_defaults(value, SCHEMA), closed(SCHEMA))
        return
    with pytest.raises(UserError) as error:
        check_schema(with_defaults(value, SCHEMA), closed(SCHEMA))
    assert words in str(error.value)


def test_the_open_schema_lets_a_typo_pass_and_the_closed_one_does_not() -> None:
    wrong = {"closed": {"a": 1, "aa": 1}}
    check_schema(wrong, SCHEMA)
    with pytest.raises(UserError, match=r"closed\.aa"):
        check_schema(wrong, closed(SCHEMA))
