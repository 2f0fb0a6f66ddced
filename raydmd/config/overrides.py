"""What a user gave for a tree of settings: ``key.path=value``, old names of keys, and what is wrong with it."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raydmd.errors import UserError, nearest

RENAMED = {"prompts.encoders": "prompts.stream_workers"}
"""Keys of older recipes, section.key, and what they are called now, in the same section."""


def with_new_names(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a recipe's plain values with the keys of `RENAMED` by their names of today, as old recipes have them.

    Args:
        tree: the values, which stay as they are.
        source: where they are from.

    Raises:
        UserError: a key is there by both of its names.
    """
    for old, new in RENAMED.items():
        section, name = old.split(".")
        values, now = tree.get(section), new.split(".")[1]
        if not isinstance(values, dict) or name not in values:
            continue
        if now in values:
            raise UserError(f"{source}: {old}: it is called {new} now, which is given, too; leave {old} out")
        tree = {**tree, section: {(now if key == name else key): value for key, value in values.items()}}
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a tree by ``key.path=value``.

    Raises:
        UserError: it is of another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or HIDDEN.search(key):
        raise UserError(f"--set {shown_override(override)}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {shown_override(override)}: the value is not readable as YAML") from None
    *parents, last = RENAMED.get(key, key).split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {shown_override(override)}: '{parent}' is a value, not a section")
    node[last] = value


HIDDEN = re.compile("://|@")  # a URI, or a part of one, may hold credentials


def shown_override(override: str) -> str:
    """Return ``KEY=VALUE`` as a message may repeat it: without its value where that may hold a secret."""
    key = re.match(r"[\w.-]*", override)[0]  # type: ignore[index]  # it always matches
    secret = re.search(r"(key|secret|token|password|credential)s?$", key.lower())
    return key if secret or HIDDEN.search(override) else override


def _got(value: object) -> str:
    """Return the words on a wrong value; none where it may hold a secret."""
    return "" if HIDDEN.search(text := repr(value)) else f" (got {text})"


def blamed(error: ValidationError, overrides: Sequence[str]) -> str | None:
    """Return ``--set KEY=VALUE`` of the last override that set, or lies in, what ``explain`` tells of; None: none.

    The value is left out where it may hold a secret.
    """
    first = first_error(error)
    where = [str(part) for part in first["loc"] if part not in UNION]
    for override in reversed(overrides):
        name = override.partition("=")[0]
        key = RENAMED.get(name, name).split(".")
        shared = min(len(key), len(where))
        if key[:shared] == where[:shared] if where else name in first["msg"]:
            return f"--set {shown_override(override)}"
    return None


ONE = ("constrained-int", "constrained-float")  # pydantic's names for the sides of `iterations` and `guidance_scale`
UNION = (*ONE, "list[constrained-int]", "tuple[constrained-float, constrained-float]")


def first_error(error: ValidationError) -> Any:
    """Return the error that is told: the first; a key that is missing only where nothing that is given is wrong."""
    errors = error.errors()
    return next((each for each in errors if each["type"] != "missing"), errors[0])


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Reduce pydantic's report on a tree of ``root`` to one line: the key's path, what is wrong, the nearest key."""
    errors, first = error.errors(), first_error(error)
    if first["loc"][-1:] and first["loc"][-1] in ONE and isinstance(first["input"], list):  # what the list's side says
        first = errors[errors.index(first) + 1]
    where = ".".join(str(part) for part in first["loc"] if part not in UNION)
    if first["type"] == "extra_forbidden" or _is_no_role(first["loc"], first["type"], root):
        *parents, key = [str(part) for part in first["loc"]]
        return f"unknown key '{where}'{nearest(key, _keys(root, parents))}"
    if first["type"] == "model_type":
        keys = ", ".join(_keys(root, [str(part) for part in first["loc"]]))
        return f"'{where}' is a section, not a value{_got(first['input'])}; its keys: {keys}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else _got(first["input"])
    return message if not where or message.startswith(f"{where}.") else f"{where}: {message}{value}"


def _is_no_role(where: tuple[int | str, ...], kind: str, root: type[BaseModel]) -> bool:
    """Whether a key that a section does not know has a value that no role's section is."""
    return kind == "model_type" and len(where) == 2 and str(where[1]) not in _keys(root, [str(where[0])])


def _keys(root: type[BaseModel], parents: list[str]) -> list[str]:
    section: Any = root
    for parent in parents:
        field = section.model_fields.get(parent)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)
