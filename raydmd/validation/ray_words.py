"""What Ray itself knows of node labels, the options of `ray start` and environments, asked of the installed Ray."""

import json
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

from raydmd.errors import UserError, nearest
from raydmd.runtime.ray_compat import check_label, node_labels

MARKETS = ("spot", "on-demand")


@cache
def start_options() -> frozenset[str]:
    """Return the options of `ray start` without dashes."""
    from ray.scripts.scripts import start

    return frozenset(name.lstrip("-") for option in start.params for name in (*option.opts, *option.secondary_opts))


def check_labels(labels: Mapping[str, Any], where: str) -> None:
    """Check a node's labels: Ray's syntax, Ray's own keys, the market's name.

    Raises:
        UserError: names the label.
    """
    known = node_labels()
    for key, value in labels.items():
        if not isinstance(value, str):
            raise UserError(f"{where}.{key}: {value!r} is not of type string; put it in quotes")
        try:
            check_label(key, value)
        except ValueError as error:
            raise UserError(f"{where}.{key}: {' '.join(str(error).split())}") from None
        if key.startswith("ray.io/") and key not in known:
            raise UserError(f"unknown label '{where}.{key}'{nearest(key, sorted(known))}")
        near = nearest(key, known)
        if "/" not in key and near.startswith("; did") and key in {name.partition("/")[2] for name in known}:
            raise UserError(f"{where}.{key}: Ray's own label has the prefix ray.io/{near}")
        if key == "ray.io/market-type" and value not in MARKETS:
            raise UserError(f"{where}.{key}: '{value}' is unknown{nearest(value, MARKETS)}")


def check_start_params(params: Mapping[str, Any], where: str) -> None:
    """Check the keys of KubeRay's rayStartParams.

    Raises:
        UserError: an option that `ray start` does not have.
    """
    for key in params:
        if key not in start_options():
            raise UserError(f"unknown key '{where}.{key}'{_near_option(key)}")


def check_start_command(command: str, where: str) -> None:
    """Check each `ray start` in a shell command: its options, and the JSON of those that take it.

    Raises:
        UserError: an option that `ray start` does not have, JSON that cannot be read, an open quote.
    """
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        raise UserError(f"{where}: not a shell command: {error}") from None
    inside = False
    for number, word in enumerate(words):
        if word == "start" and number and words[number - 1].rpartition("/")[2] == "ray":
            inside = True
        elif word and all(letter in "();<>|&" for letter in word):
            inside = False
        elif inside and word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name not in start_options():
                raise UserError(f"{where}: `ray start` has no option --{name}{_near_option(name, '--')}")
            if name in ("system-config", "resources"):
                _check_json(value if equals else (words + [""])[number + 1], f"{where}: --{name}")


def check_runtime_env(text: str, where: str) -> None:
    """Check the YAML text of a runtime environment.

    Raises:
        UserError: not a mapping, a field that Ray does not know, or a value that it refuses.
    """
    from ray.runtime_env import RuntimeEnv

    from raydmd.validation.document import read_documents

    documents = read_documents(text)
    if not documents:
        return
    fields = documents[0]
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a mapping of keys is expected, not a {type(fields).__name__}")
    public = sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
    for key in fields:
        if key not in public:
            raise UserError(f"unknown key '{where}.{key}'{nearest(key, public)}")
    env = fields.get("env_vars") or {}
    for key, value in env.items() if isinstance(env, dict) else ():
        if not isinstance(value, str):
            raise UserError(f"{where}.env_vars.{key}: {value!r} is not of type string; put it in quotes")


def _check_json(text: str, where: str) -> None:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object is expected")


def _near_option(key: str, dashes: str = "") -> str:
    near = nearest(key, start_options())
    return near.replace("'", f"'{dashes}", 1) if near.startswith("; did") else " (see `ray start --help`)"
