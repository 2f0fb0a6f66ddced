"""Checks of KubeRay's RayCluster, RayJob and RayService: the operator's closed schemas, and what strings hold."""

import json
import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from raydmd.errors import UserError, nearest
from raydmd.extras import require_extra
from raydmd.methods.loading import load_recipe
from raydmd.serving.settings import parse_serving
from raydmd.validation.document import check_schema, closed, read_documents, with_defaults
from raydmd.validation.ray_words import check_labels, check_runtime_env, check_start_params

Commands = Mapping[str, click.Command]
APPLICATION = "raydmd.serving.app:build"
KINDS = {"RayCluster": "raycluster", "RayJob": "rayjob", "RayService": "rayservice"}
VERSION = "ray.io/v1"
METADATA = {
    **{key: {"type": "string"} for key in ("name", "generateName", "namespace")},
    **{key: {"type": "object", "additionalProperties": {"type": "string"}} for key in ("labels", "annotations")},
    "finalizers": {"type": "array", "items": {"type": "string"}},
    "ownerReferences": {"type": "array"},
}


@cache
def _schema(kind: str) -> dict[str, Any]:
    text = files("raydmd").joinpath("schemas", "kuberay", f"{KINDS[kind]}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    schema["properties"]["metadata"] = {"type": "object", "properties": METADATA}
    return closed(schema) | {"required": ["metadata", "spec"]}


def check_kuberay(document: dict[str, Any], commands: Commands) -> None:
    """Check one object of KubeRay.

    Args:
        document: the object.
        commands: the command line's own, for entry points.

    Raises:
        UserError: the path of the first wrong key or value and the nearest right one.
    """
    kind, version = str(document.get("kind")), document.get("apiVersion")
    if kind not in KINDS:
        raise UserError(f"kind: '{kind}' is unknown{nearest(kind, KINDS)}")
    if version != VERSION:
        raise UserError(f"apiVersion: '{version}' is not {VERSION}")
    schema = _schema(kind)
    document = with_defaults(document, schema)
    check_schema(document, schema)
    metadata, spec = document["metadata"], document["spec"]
    if not metadata.get("name") and not metadata.get("generateName"):
        raise UserError("metadata: 'name' is missing")
    if kind == "RayCluster":
        _check_cluster(spec, "spec")
    elif kind == "RayJob":
        if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
            raise UserError("spec: 'rayClusterSpec' is missing (or 'clusterSelector', for a cluster that runs)")
        if spec.get("rayClusterSpec"):
            _check_cluster(spec["rayClusterSpec"], "spec.rayClusterSpec")
        if spec.get("runtimeEnvYAML"):
            check_runtime_env(spec["runtimeEnvYAML"], "spec.runtimeEnvYAML")
        _check_entrypoint(spec.get("entrypoint", ""), "spec.entrypoint", commands)
    else:
        _check_cluster(spec["rayClusterConfig"], "spec.rayClusterConfig")
        _check_serve(spec.get("serveConfigV2", ""), "spec.serveConfigV2")


def _check_cluster(spec: dict[str, Any], where: str) -> None:
    groups = spec.get("workerGroupSpecs") or []
    places = [(spec["headGroupSpec"], f"{where}.headGroupSpec")] if "headGroupSpec" in spec else []
    places += [(group, f"{where}.workerGroupSpecs[{number}]") for number, group in enumerate(groups)]
    for group, place in places:
        check_start_params(group.get("rayStartParams") or {}, f"{place}.rayStartParams")
        check_labels(group.get("labels") or {}, f"{place}.labels")
        if "spec" not in group["template"]:
            raise UserError(f"{place}.template: 'spec' is missing")
        _check_pod(group["template"]["spec"], f"{place}.template.spec")
    names: set[str] = set()
    for group, place in places[1:] if "headGroupSpec" in spec else places:
        low, high = group["minReplicas"], group["maxReplicas"]
        if low > high:
            raise UserError(f"{place}.minReplicas ({low}) is above maxReplicas ({high})")
        if group["groupName"] in names:
            raise UserError(f"{place}.groupName: '{group['groupName']}' names another group, too")
        names.add(group["groupName"])


def _check_pod(pod: dict[str, Any], where: str) -> None:
    volumes = [volume["name"] for volume in pod.get("volumes") or []]
    if not pod["containers"]:
        raise UserError(f"{where}.containers: there is none")
    for number, container in enumerate(pod["containers"]):
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                place = f"{where}.containers[{number}].volumeMounts"
                raise UserError(f"{place}: no volume '{mount['name']}'{nearest(mount['name'], volumes)}")


def _check_entrypoint(entrypoint: str, where: str, commands: Commands) -> None:
    """Check a command of ours: `python .../jobs/NAME.py ...` or `raydmd NAME ...`; anyone else's passes."""
    try:
        words = shlex.split(entrypoint)
    except ValueError as error:
        raise UserError(f"{where}: not a shell command: {error}") from None
    found = [number for number, word in enumerate(words) if PurePosixPath(word).parent.name == "jobs"]
    if found:
        name, rest = PurePosixPath(words[found[0]]).stem, words[found[0] + 1 :]
    elif "raydmd" in words[:-1]:
        name, rest = words[words.index("raydmd") + 1], words[words.index("raydmd") + 2 :]
    else:
        return
    if name not in commands:
        raise UserError(f"{where}: no command '{name}'{nearest(name, commands)}")
    try:
        context = commands[name].make_context(name, rest)
        recipe = context.params.get("recipe")
        if recipe is not None and not recipe.endswith((".yaml", ".yml")):  # a file is in the image, not here
            load_recipe(recipe, list(context.params.get("overrides", ())))
    except click.ClickException as error:
        raise UserError(f"{where}: {error.format_message()}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_serve(text: str, where: str) -> None:
    """Check Ray Serve's configuration, a YAML text inside the manifest."""
    documents = read_documents(text)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise UserError(f"{where}: one mapping of keys is expected")
    check_serve_config(documents[0], where)


def check_serve_config(document: dict[str, Any], where: str) -> None:
    """Check what `serve deploy` takes with Serve's own models, and our application's settings with ours.

    Raises:
        UserError: one line that names the first wrong key's path and the nearest right one.
    """
    require_extra("serve", where or "a Serve configuration")
    from ray.serve.schema import ServeDeploySchema

    _check_model(document, ServeDeploySchema, where)  # Serve itself lets unknown keys pass
    try:
        config = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}.{place}: {' '.join(first['msg'].split())}") from None
    for number, application in enumerate(config.applications):
        if application.import_path == APPLICATION:
            parse_serving(dict(application.args), f"{where}.applications[{number}].args")


def _check_model(value: Any, model: Any, where: str) -> None:
    """Refuse keys that a tree of pydantic models does not name."""
    for option in getattr(model, "__args__", ()):
        _check_model(value, option, where)
    if isinstance(value, list):
        for number, part in enumerate(value):
            _check_model(part, model, f"{where}[{number}]")
    if not isinstance(value, dict) or not isinstance(model, type) or not issubclass(model, BaseModel):
        return
    for key, part in value.items():
        if key not in model.model_fields:
            raise UserError(f"unknown key '{where}.{key}'{nearest(str(key), model.model_fields)}")
        _check_model(part, model.model_fields[key].annotation, f"{where}.{key}")
