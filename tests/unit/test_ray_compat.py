"""Ray's private names are used in one module, and this Ray, which pyproject.toml allows, has them."""

import importlib
import inspect
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement

from raydmd.errors import UserError
from raydmd.runtime.ray_compat import NEWEST, OLDEST, check_version
from raydmd.serving.haproxy import SETTINGS

pytestmark = pytest.mark.ray_private
ROOT = Path(__file__).parents[2]
NAMES = {
    "ray._private.utils": ["set_sigterm_handler"],
    "ray._private.grpc_utils": ["init_grpc_channel"],
    "ray._private.authentication.authentication_token_setup": ["ensure_token_if_auth_enabled"],
    "ray._private.services": ["get_ray_address_from_environment", "canonicalize_bootstrap_address", "ConsolePopen"],
    "ray._private.ray_logging": ["global_worker_stdstream_dispatcher"],
    "ray._private.auto_init_hook": ["enable_auto_connect"],
    "ray._private.state": ["state"],
    "ray.autoscaler.v2.sdk": ["get_cluster_resource_state"],
    "ray.core.generated.gcs_service_pb2": ["GetClusterIdRequest"],
    "ray.core.generated.gcs_service_pb2_grpc": ["NodeInfoGcsServiceStub"],
    "ray._private.worker": ["_global_node", "global_worker", "print_worker_logs"],
    "ray._private.label_utils": ["validate_label_key", "validate_label_value"],
    "ray.autoscaler._private.util": ["prepare_config", "validate_config"],
    "ray.serve._private.haproxy": ["HAProxyApi"],
    "ray.serve._private.replica": ["add_port_to_grpc_server"],
}
HAPROXY = ["start", "stop", "_start_and_wait_for_haproxy", "_graceful_reload", "_is_running"]  # that are overridden


def test_this_ray_has_every_private_name_that_is_used() -> None:
    source = (ROOT / "raydmd" / "runtime" / "ray_compat.py").read_text()
    for module, names in NAMES.items():
        found = importlib.import_module(module)
        assert module.rpartition(".")[2] in source
        assert [name for name in names if not hasattr(found, name)] == [], module
        assert [name for name in names if name not in source] == [], module
    assert all(hasattr(ray._private.state.state, name) for name in ("actor_table", "get_draining_nodes"))


def test_this_rays_haproxy_is_the_one_that_is_watched() -> None:
    api = importlib.import_module("ray.serve._private.haproxy").HAProxyApi
    assert [name for name in HAPROXY if not hasattr(api, name)] == []
    assert "self._proc" in inspect.getsource(api._is_running)
    settings = "".join(path.read_text() for path in Path(ray.__file__).parent.glob("serve/_private/*.py"))
    assert [name for name in SETTINGS if name not in settings] == []


def test_this_ray_is_one_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyproject.toml and what is checked before a command starts say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [Requirement(line) for line in project["dependencies"] if line.startswith("ray[")]
    assert wanted.specifier.contains(ray.__version__)
    check_version()
    (major, oldest), (_, newest) = OLDEST, NEWEST
    for minor in range(oldest - 2, newest + 3):
        version = f"{major}.{minor}.0"
        monkeypatch.setattr(ray, "__version__", version)
        with nullcontext() if wanted.specifier.contains(version) else pytest.raises(UserError, match=version):
            check_version()


def test_no_other_module_uses_a_private_name() -> None:
    private = re.compile(r"\bray(\.\w+)*\._(?!_)|from ray import _|ray\.core\b|\._actor_id\b")
    found = {
        str(path.relative_to(ROOT)) for path in (ROOT / "raydmd").rglob("*.py") if private.search(path.read_text())
    }
    assert found == {"raydmd/runtime/ray_compat.py"}
