"""A recipe in miniature: a random tiny teacher in place of its own, and sizes that a laptop has done in a minute.

``teacher.path: tiny``, in a recipe or by ``--set``, asks for it. Which keys become smaller, and how small, is said by
the fields of the recipe's own sections (`raydmd.config.recipe.in_miniature`); all else stays as the recipe has it.
"""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from raydmd.config.recipe import Recipe
from raydmd.methods.registry import find_method

TINY = "tiny"
OWN = ("dtype", "variant", "subfolder")  # options of a teacher that are of its own files


def is_tiny(tree: Mapping[str, Any]) -> bool:
    """Whether a recipe's plain values ask for a miniature."""
    teacher = tree.get("teacher")
    return isinstance(teacher, dict) and teacher.get("path") == TINY


def shrink(tree: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain values in miniature. What cannot be right in it is left for validation to name.

    Args:
        tree: the recipe's own.
        wanted: the same with the command line's values, which says of which method and teacher it is.

    Raises:
        UserError: an unknown method, or a family that has no tiny model.
    """
    from raydmd.models.tiny.teacher import find_tiny

    made = dict(tree)
    teacher, method = wanted["teacher"], wanted.get("method")
    family = teacher.get("family", Recipe.model_fields["teacher"].default.family)
    tiny = find_tiny(family, teacher.get("tiny"))
    options = tiny.options if tiny is not None else {}
    name = method.get("name") if isinstance(method, dict) else None
    sections: dict[str, Any] = {key: _section(field.annotation) for key, field in Recipe.model_fields.items()}
    if isinstance(name, str):
        sections["method"] = find_method(name).options_type
    for key, field in Recipe.model_fields.items():
        _shrink(made, key, field, sections[key])
    own = made.get("teacher")
    if isinstance(own, dict) and isinstance(given := own.get("options", {}), dict):
        kept = {key: value for key, value in given.items() if key not in OWN}
        made["teacher"] = {**own, "path": None, "tiny": tiny.name if tiny else family, "options": {**kept, **options}}
    return made


def _shrink(values: dict[str, Any], key: str, field: Any, section: type[BaseModel] | None) -> None:
    """Make one key of a section smaller, or those below it."""
    if section is None:
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "miniature" in extra:
            default = field.get_default(call_default_factory=True)
            values[key] = _less(values.get(key, default), extra["miniature"])
        return
    below = values.get(key)
    if below is None:
        below = {}
    if not isinstance(below, dict):
        return
    values[key] = below = dict(below)
    for name, inner in section.model_fields.items():
        _shrink(below, name, inner, _section(inner.annotation))
    further = _section((get_args(section.__annotations__.get("__pydantic_extra__")) or (None,))[-1])
    for name in set(below) - set(section.model_fields) if further is not None else ():
        _shrink(below, name, None, further)


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds; None: it holds a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _less(value: Any, tiny: Any) -> Any:
    """Return the smaller of two numbers; of a list of numbers the shares of the smaller; all else becomes ``tiny``."""
    number = isinstance(tiny, int | float) and not isinstance(tiny, bool)
    if number and isinstance(value, list):
        return [max(1, int(tiny) // max(len(value), 1))] * len(value)
    if value is None and number:
        return None
    return min(value, tiny) if number and isinstance(value, int | float) else tiny
