"""`raydmd validate`: says by its content what a file is, and checks it without a cluster or a cloud.

A recipe, a cluster-launcher file, a Ray Serve configuration, or Kubernetes objects of KubeRay; other Kubernetes objects
and Prometheus' files are left to their own tools.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError, nearest
from raydmd.methods.loading import load_strangers_recipe
from raydmd.validation.document import read_documents
from raydmd.validation.kuberay import KINDS, Commands, check_kuberay, check_serve_config
from raydmd.validation.launcher import check_launcher, launcher_keys

OBJECT = ("apiVersion", "kind", "metadata", "spec")
SERVE = ("proxy_location", "http_options", "grpc_options", "logging_config", "applications", "target_capacity")
SAME_WORD = 0.75  # similarity of a key and its misspelling; below, a file without any right key is of another kind
PROMETHEUS = ("groups", "scrape_configs")


class Verdict(NamedTuple):
    """What a file is.

    Attributes:
        words: its kinds, and what could not be told here.
        checked: whether any part of it was checked; else it is for other tools, or unknown.
    """

    words: str
    checked: bool


def validate_file(path: Path, commands: Commands) -> str:
    """Check a file and return in words what it is, e.g. ``recipe`` or ``RayJob; PersistentVolumeClaim skipped``.

    Raises:
        UserError: as `inspect_file`.
    """
    return inspect_file(path, commands).words


def inspect_file(path: Path, commands: Commands, overrides: Sequence[str] = ()) -> Verdict:
    """Check a file, and say in words what it is and whether it was checked.

    Args:
        path: the file.
        commands: the command line's own by name: the entry points of jobs are checked with them.
        overrides: ``key.path=value`` of the command line, for recipes.

    Raises:
        UserError: one line that names the file, the first wrong key's path and the nearest right one.
    """
    try:
        documents = read_documents(path.read_text(encoding="utf-8"))
        if not documents:
            raise UserError("nothing in it")
        kinds = [_check(document, path, commands, overrides) for document in documents]
    except UnicodeDecodeError:
        raise UserError(f"{path}: unknown kind of file: it is not text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    checked = [kind for kind, known in kinds if known]
    skipped = [kind for kind, known in kinds if not known]
    words = "; ".join(filter(None, [", ".join(checked), f"{', '.join(skipped)} skipped" if skipped else ""]))
    return Verdict(words, bool(checked))


def _check(document: Any, path: Path, commands: Commands, overrides: Sequence[str]) -> tuple[str, bool]:
    """Check one document; return its kind and whether it was checked (else another tool's)."""
    if not isinstance(document, dict):
        raise UserError(f"unknown kind of file: a mapping of keys is expected, not a {type(document).__name__}")
    keys = [str(key) for key in document]
    tops = {"object": OBJECT, "launcher": tuple(launcher_keys()), "serve": SERVE, "recipe": tuple(Recipe.model_fields)}
    if any(key in PROMETHEUS for key in keys):
        return "Prometheus (check it with promtool)", False
    kind = max(tops, key=lambda name: (sum(key in tops[name] for key in keys), _near(keys, tops[name])))
    if not any(key in tops[kind] or get_close_matches(key, tops[kind], cutoff=SAME_WORD) for key in keys):
        raise UserError(
            f"unknown kind of file: neither a recipe, a cluster-launcher file, a Serve configuration nor a KubeRay "
            f"manifest (its keys: {', '.join(keys)})"
        )
    if kind == "launcher":
        check_launcher(document)
        return "cluster launcher", True
    if kind == "serve":
        try:
            check_serve_config(document, "")
        except UserError as error:  # the path begins at the file's top
            raise UserError(str(error).removeprefix(".").replace("'.", "'")) from None
        return "Serve configuration", True
    if kind == "recipe":
        said = _recipe(path, overrides)
        return f"recipe; {'; '.join(said)}" if said else "recipe", True
    for key in keys:
        if key not in OBJECT and nearest(key, OBJECT).startswith("; did"):
            raise UserError(f"unknown key '{key}'{nearest(key, OBJECT)}")
    if not isinstance(document.get("kind"), str):
        raise UserError("'kind' is missing" if "kind" not in document else "kind: a word is expected")
    group = str(document.get("apiVersion", "")).partition("/")[0]
    if document["kind"] in KINDS or group == "ray.io":
        check_kuberay(document, commands)
        return str(document["kind"]), True
    word = nearest(str(document["kind"]), KINDS)
    if "apiVersion" not in document or (str(document["kind"]).lower().startswith("ray") and word.startswith("; did")):
        raise UserError(f"kind: unknown kind '{document['kind']}'{word}")
    return str(document["kind"]), False


def _near(keys: list[str], names: tuple[str, ...]) -> int:
    return sum(nearest(key, names).startswith("; did") for key in keys)


def _recipe(path: Path, overrides: Sequence[str]) -> list[str]:
    """Check a recipe as `raydmd distill` does; return what only a network, a hub or a cluster can tell.

    Raises:
        UserError: what `raydmd distill` refuses.
    """
    from raydmd.evaluation.validation_prompts import check_validation_prompts
    from raydmd.recipe_check import check_offline, miniature_note, with_tiny_teacher
    from raydmd.runs.run import recipe_family

    try:
        given = load_strangers_recipe(path, overrides)
        with with_tiny_teacher(given) as recipe:
            told = [*miniature_note(given), *check_offline(recipe)]
            if "://" not in (recipe.prompts.path or "") and "://" not in (recipe.teacher.path or ""):
                check_validation_prompts(recipe, recipe_family(recipe))
        return told
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{path}: ")) from None
