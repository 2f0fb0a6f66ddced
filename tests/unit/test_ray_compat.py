"""Ray's private names are used in one module of the runtime, and this Ray, which pyproject.toml allows, has them."""

import importlib
import re
import tomllib
from pathlib import Path

import ray
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
NAMES = {
    "ray._private.utils": ["set_sigterm_handler"],
    "ray._private.worker": ["_global_node", "global_worker"],
    "ray._private.grpc_utils": ["init_grpc_channel"],
    "ray._private.authentication.authentication_token_setup": ["ensure_token_if_auth_enabled"],
    "ray._private.services": ["get_ray_address_from_environment", "canonicalize_bootstrap_address", "ConsolePopen"],
    "ray._private.ray_logging": ["global_worker_stdstream_dispatcher"],
    "ray._private.auto_init_hook": ["enable_auto_connect"],
    "ray._private.state": ["state"],
    "ray.autoscaler.v2.sdk": ["get_cluster_resource_state"],
}


def test_this_ray_has_every_private_name_that_is_used() -> None:
    source = (ROOT / "raydmd" / "runtime" / "ray_compat.py").read_text()
    for module, names in NAMES.items():
        found = importlib.import_module(module)
        assert module.rpartition(".")[2] in source
        assert [name for name in names if not hasattr(found, name)] == [], module
        assert [name for name in names if name not in source] == [], module
    assert all(hasattr(ray._private.state.state, name) for name in ("actor_table", "get_draining_nodes"))


def test_this_ray_is_one_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [Requirement(line) for line in project["dependencies"] if line.startswith("ray[")]
    assert wanted.specifier.contains(ray.__version__)


def test_no_other_module_of_the_runtime_uses_a_private_name() -> None:
    found = {
        path.name
        for path in (ROOT / "raydmd" / "runtime").rglob("*.py")
        if re.search(r"ray\._private|from ray import _raylet|ray\._raylet|\._actor_id", path.read_text())
    }
    assert found == {"ray_compat.py"}
