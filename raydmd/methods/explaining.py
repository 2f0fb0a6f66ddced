"""What a key of a recipe means: its description, what it takes, its default and the recipe's value.

All of it comes from the sections' own fields and the families' options; there is no second list.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raydmd.config.comments import comment_beside
from raydmd.config.recipe import Recipe, read_tree
from raydmd.errors import UserError, nearest
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import build_method
from raydmd.models.registry import FAMILIES

WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null",
         "object": "a mapping", "array": "a list"}  # fmt: skip
LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


@dataclass(frozen=True)
class Explained:
    """A key.

    Attributes:
        key: its path.
        description: what it means.
        kind: what values it takes; of a section its keys.
        default: without the key; None: a section, or the key must be given.
        value: the recipe's; None: a section.
        source: where the value comes from, by the comment beside it.
    """

    key: str
    description: str
    kind: str
    default: str | None
    value: str | None
    source: str | None

    def lines(self) -> list[str]:
        """Return it in words, a line each."""
        said = [f"{self.key}: {self.description}", f"  takes    {self.kind}"]
        said += [f"  default  {self.default}"] if self.default is not None else []
        source = f" ({self.source})" if self.source else ""
        return [*said, *([f"  here     {self.value}{source}"] if self.value is not None else
                         [f"  here     {self.source}"] if self.source else [])]  # fmt: skip


def all_keys(recipe: Recipe) -> list[str]:
    """Return every key of a recipe, sections and the keys below them."""
    found: list[str] = []

    def walk(section: BaseModel, before: str) -> None:
        for name in [*type(section).model_fields, *(section.model_extra or {})]:
            value = getattr(section, name)
            found.append(f"{before}{name}")
            if isinstance(value, BaseModel):
                walk(value, f"{before}{name}.")
            elif found[-1] == "teacher.options":
                found.extend(f"teacher.options.{option}" for option in _options(recipe))

    walk(_completed(recipe), "")
    return found


def explain_key(name: str, key: str, overrides: tuple[str, ...] = (), plugins: tuple[str, ...] = ()) -> Explained:
    """Say what a key of a recipe means.

    Args:
        name: of the recipe, or its file.
        key: the key's path.
        overrides: of the command line.
        plugins: of the command line.

    Raises:
        UserError: no such recipe or key; the nearest right one is named.
    """
    given = load_recipe(name, overrides, plugins)
    _, source = read_tree(name)
    keys = [override.partition("=")[0] for override in overrides]
    if any(f"{key}.".startswith(f"{set_}.") for set_ in keys):
        return explain_in(given, "", key)
    return explain_in(given, Path(source).read_text(encoding="utf-8"), key)


def explain_in(given: Recipe, text: str, key: str) -> Explained:
    """Say what a key of a recipe means.

    Args:
        given: the recipe.
        text: of its file, whose comments say where values come from; empty: they come from elsewhere.
        key: the key's path.

    Raises:
        UserError: no such key; the nearest right one is named.
    """
    recipe, path = _completed(given), key.split(".")
    comment = comment_beside(text, path)
    section: Any = recipe
    for depth, part in enumerate(path[:-1]):
        if path[: depth + 1] == ["teacher", "options"]:
            break
        section = getattr(section, part, None) if part in _names(section) else None
        if not isinstance(section, BaseModel):
            raise _unknown(key, given)
    if path[:2] == ["teacher", "options"] and len(path) > 2:
        return _explain_option(given, path, comment)
    if path[-1] not in _names(section):
        raise _unknown(key, given)
    field, value = type(section).model_fields.get(path[-1]), getattr(section, path[-1])
    if isinstance(value, BaseModel):
        return Explained(
            key, _summary(type(value)), f"a section; its keys: {', '.join(_names(value))}", None, None, comment
        )
    assert field is not None
    required = field.is_required()
    default = None if required else _shown(_plain(field.get_default(call_default_factory=True)))
    return Explained(key, description(type(section), path[-1]), _kind(field), default, _shown(_plain(value)), comment)


def description(section: type[BaseModel], name: str) -> str:
    """Return what a section's field means; one that only has another default means what its parent's does."""
    fields = [each.model_fields.get(name) for each in section.__mro__ if issubclass(each, BaseModel)]
    return next((field.description for field in fields if field is not None and field.description), "")


def _completed(recipe: Recipe) -> Recipe:
    """Return the recipe with a section for each role of its method."""
    method, changes = build_method(recipe), dict[str, Any]()
    for name, roles in (("runtime", list(method.roles)), ("optimizer", method.trained())):
        section = getattr(recipe, name)
        further = {role: section.of(role) for role in roles if role not in type(section).model_fields}
        named = {key: getattr(section, key) for key in type(section).model_fields}
        changes[name] = type(section)(**{**named, **further, **(section.model_extra or {})})
    return recipe.model_copy(update=changes)


def _names(section: Any) -> list[str]:
    return [*type(section).model_fields, *(section.model_extra or {})] if isinstance(section, BaseModel) else []


def _options(recipe: Recipe) -> Mapping[str, Any]:
    family = FAMILIES.get(recipe.teacher.family)
    return family.defaults if family is not None else {}


def _explain_option(recipe: Recipe, path: list[str], comment: str | None) -> Explained:
    """Say what an option of the teacher's family means."""
    options, key = _options(recipe), ".".join(path)
    if len(path) > 3 or path[2] not in options:
        raise UserError(f"unknown key '{key}'{nearest(path[2], options)}")
    default = options[path[2]]
    described = FAMILIES[recipe.teacher.family].meaning(path[2])
    kind = WORDS.get(TypeAdapter(type(default)).json_schema().get("type", ""), "a value")
    value = recipe.teacher.options.get(path[2], default)
    return Explained(key, described, kind, _shown(_plain(default)), _shown(_plain(value)), comment)


def _unknown(key: str, recipe: Recipe) -> UserError:
    """Return the error for a key that there is not; the nearest is named by its whole path."""
    keys = all_keys(recipe)
    last = key.split(".")[-1]
    same = [each for each in keys if each.split(".")[-1] == last]
    near = f"; did you mean '{same[0]}'?" if same else nearest(key, keys)
    return UserError(f"unknown key '{key}'{near if near.startswith('; did') else nearest(key, Recipe.model_fields)}")


def _summary(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").strip().split("\n\n")[0].split()).rstrip(".")


def _kind(field: FieldInfo) -> str:
    """Return in words what a field takes."""
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[tuple([annotation, *field.metadata])]
    schema = TypeAdapter(annotation).json_schema()
    return _schema(schema)


def _schema(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_schema(each) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(str(each) for each in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "a value"))
    limits = ", ".join(f"{word} {schema[name]:g}" for name, word in LIMITS.items() if name in schema)
    if kind == "array":
        inner = schema.get("prefixItems") or [schema.get("items") or {}]
        each = ", ".join(dict.fromkeys(_schema(item) for item in inner))
        return f"a list of {each}" if "prefixItems" not in schema else f"a list of {len(inner)}, each {each}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"a mapping to {_schema(schema['additionalProperties'])}"
    return f"{WORDS.get(kind, kind)}{f' {limits}' if limits else ''}"


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
    """Return a value as YAML has it on one line."""
    if value is PydanticUndefined:
        return "none"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.strip().removesuffix("...").strip()
