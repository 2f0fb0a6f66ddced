"""Reading YAML strictly, and holding a tree of plain values against a JSON schema."""

import copy
from collections.abc import Iterable
from typing import Any

import yaml
from jsonschema import Draft7Validator, ValidationError

from raydmd.errors import UserError, nearest
from raydmd.strict_yaml import StrictLoader


def read_documents(text: str) -> list[Any]:
    """Return the documents of a YAML text, without empty ones.

    Raises:
        yaml.YAMLError: not YAML.
        UserError: a key is given twice in one mapping.
    """
    documents = yaml.load_all(text, Loader=StrictLoader)  # noqa: S506  (a SafeLoader)
    return [document for document in documents if document is not None]


def closed(schema: Any) -> Any:
    """Return a Kubernetes schema in which keys that it does not name are refused.

    Kubernetes itself drops such keys without a word. ``x-kubernetes-preserve-unknown-fields``, ``nullable`` and
    ``x-kubernetes-int-or-string`` keep their meaning.
    """
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(part) for key, part in schema.items() if key not in ("properties", "default", "enum")}
    result |= {key: schema[key] for key in ("default", "enum") if key in schema}
    if "properties" in schema:
        result["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        result.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        result["type"] = [schema["type"], "null"]
    return result


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """Return ``value`` with the schema's defaults where keys are absent, as Kubernetes does before it checks."""
    if isinstance(value, dict):
        filled = dict(value)
        for name, part in schema.get("properties", {}).items():
            if name in filled:
                filled[name] = with_defaults(filled[name], part)
            elif "default" in part:
                filled[name] = copy.deepcopy(part["default"])
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            known = schema.get("properties", {})
            filled = {key: part if key in known else with_defaults(part, extra) for key, part in filled.items()}
        return filled
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [with_defaults(part, schema["items"]) for part in value]
    return value


def check_schema(value: Any, schema: dict[str, Any]) -> None:
    """Hold ``value`` against ``schema``.

    Raises:
        UserError: the path of the first unknown key and the nearest right one, else of the first wrong value.
    """
    errors = list(Draft7Validator(schema).iter_errors(value))
    if errors:  # an unknown key explains a missing one
        errors.sort(key=lambda error: (error.validator != "additionalProperties", len(error.absolute_path)))
        raise UserError(_explain(errors[0]))


def join(path: Iterable[str | int]) -> str:
    """Return a path in words: ``spec.workerGroupSpecs[0].template``."""
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f"{'.' if words else ''}{part}"
    return words


def _explain(error: ValidationError) -> str:
    where = join(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        key = next(str(key) for key in error.instance if key not in known)
        return f"unknown key '{f'{where}.' if where else ''}{key}'{nearest(key, known)}"
    prefix = f"{where}: " if where else ""
    if error.validator == "required":
        return f"{prefix}{error.message.replace('is a required property', 'is missing')}"
    if error.validator == "enum":
        return f"{prefix}{error.instance!r} is unknown{nearest(str(error.instance), map(str, error.validator_value))}"
    if error.validator in ("type", "anyOf"):
        wanted = error.validator_value if error.validator == "type" else [p.get("type") for p in error.validator_value]
        words = " or ".join(wanted) if isinstance(wanted, list) else wanted
        return f"{prefix}{_short(error.instance)} is not of type {words}"
    return f"{prefix}{error.message if len(error.message) < 200 else f'{error.message[:200]} ...'}"


def _short(value: Any) -> str:
    return f"a {'mapping' if isinstance(value, dict) else 'list'}" if isinstance(value, (dict, list)) else repr(value)
