"""Checks of a cluster-launcher file (`ray up`), offline: Ray's own, and what its schema lets through."""

import copy
import difflib
import json
import logging
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from raydmd.errors import UserError, nearest
from raydmd.runtime.ray_compat import check_cluster_config
from raydmd.validation.document import check_schema
from raydmd.validation.ray_words import check_labels, check_start_command

RESOURCES = ("CPU", "GPU", "TPU", "memory", "object_store_memory")
# Keys of `provider` that Ray's AWS and GCP providers read although its schema does not name them.
PROVIDER = ("aws_credentials", "key_pair", "use_external_head_ip")
CLOUDS = ("aws", "gcp")
# What decides how much a node costs; a typo here is bought without a word, since Ray passes node_config on unread.
NODE_CONFIG = {
    "aws": ("InstanceType", "ImageId", "InstanceMarketOptions", "BlockDeviceMappings", "IamInstanceProfile", "KeyName",
            "SubnetId", "SubnetIds", "SecurityGroupIds", "Placement", "LaunchTemplate", "NetworkInterfaces",
            "CapacityReservationSpecification", "MetadataOptions", "TagSpecifications", "UserData", "CpuOptions",
            "EbsOptimized"),
    "gcp": ("machineType", "disks", "guestAccelerators", "scheduling", "metadata", "serviceAccounts",
            "networkInterfaces", "labels", "tags", "sourceInstanceTemplate", "minCpuPlatform", "reservationAffinity"),
}  # fmt: skip


@cache
def _schema() -> dict[str, Any]:
    """Return Ray's schema with `provider` closed."""
    import ray.autoscaler

    schema: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    provider = schema["properties"]["provider"]
    provider["properties"] |= dict.fromkeys(PROVIDER, True)
    node = schema["properties"]["available_node_types"].pop("patternProperties")[".*"]
    schema["properties"]["available_node_types"]["additionalProperties"] = node
    return schema


def launcher_keys() -> list[str]:
    """Return the top-level keys of a cluster-launcher file."""
    return list(_schema()["properties"])


def check_launcher(document: dict[str, Any]) -> None:
    """Check a cluster-launcher file.

    Raises:
        UserError: the path of the first wrong key or value and the nearest right one.
    """
    schema = copy.deepcopy(_schema())
    cloud = (document.get("provider") or {}).get("type") if isinstance(document.get("provider"), dict) else None
    schema["properties"]["provider"]["additionalProperties"] = cloud not in CLOUDS  # others have keys of their own
    check_schema(document, schema)
    types = document.get("available_node_types") or {}
    head = document.get("head_node_type")
    if types and head not in types:
        raise UserError(f"head_node_type: '{head}' is not in available_node_types{nearest(str(head), types)}")
    for remote, local in (document.get("file_mounts") or {}).items():
        if not isinstance(local, str):
            raise UserError(f"file_mounts.{remote}: {local!r} is not a path")
    for name, node in types.items():
        _check_node(node, f"available_node_types.{name}", str(cloud))
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for number, command in enumerate(document.get(key) or []):
            check_start_command(command, f"{key}[{number}]")
    _ask_ray(document)


def _check_node(node: dict[str, Any], where: str, cloud: str) -> None:
    for name in node["resources"]:
        if name not in RESOURCES and (near := _near_resource(name)):
            raise UserError(f"unknown resource '{where}.resources.{name}'; did you mean '{near}'?")
    if node.get("min_workers", 0) > node.get("max_workers", node.get("min_workers", 0)):
        raise UserError(f"{where}.min_workers ({node['min_workers']}) is above max_workers ({node['max_workers']})")
    known = NODE_CONFIG.get(cloud, ())
    for key in node["node_config"]:
        near = nearest(key, known)
        if key not in known and near.startswith("; did") and _alike(key, known):
            raise UserError(f"unknown key '{where}.node_config.{key}'{near}")
    labels = node.get("labels", {})
    check_labels(labels, f"{where}.labels")
    market = labels.get("ray.io/market-type")
    if market and cloud in CLOUDS and (market == "spot") != _is_spot(node["node_config"], cloud):
        bought = "on-demand" if market == "spot" else "spot"
        raise UserError(f"{where}.labels.ray.io/market-type: '{market}', but node_config asks for {bought} machines")


def _near_resource(name: str) -> str | None:
    """Return the resource that a name is surely meant to be, or None for a custom resource."""
    plain = name.lower().removeprefix("num_").rstrip("s")
    exact = {known.lower(): known for known in RESOURCES}
    return exact.get(plain) or next(
        (known for key, known in exact.items() if len(key) > 3 and _alike(plain, [key])), None
    )


def _alike(word: str, choices: Any) -> bool:
    return bool(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.8))


def _is_spot(config: dict[str, Any], cloud: str) -> bool:
    given = config.get("InstanceMarketOptions" if cloud == "aws" else "scheduling")
    parts = [part for part in (given if isinstance(given, list) else [given]) if isinstance(part, dict)]
    if cloud == "aws":
        return any(part.get("MarketType") == "spot" for part in parts)
    return any(part.get("provisioningModel") == "SPOT" or part.get("preemptible") is True for part in parts)


def _ask_ray(document: dict[str, Any]) -> None:
    """Let Ray itself complete and check the file."""
    import jsonschema

    logger = logging.getLogger("ray.autoscaler")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it remarks on the way is no error
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            check_cluster_config(copy.deepcopy(document))
    except jsonschema.ValidationError as error:
        raise UserError(f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message[:200]}") from None
    except (ValueError, KeyError, AssertionError, RuntimeError, NotImplementedError, ImportError) as error:
        raise UserError(f"Ray refuses it: {' '.join(str(error).split())}") from None
    finally:
        logger.setLevel(level)
