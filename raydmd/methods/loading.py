"""Reading a recipe: its method's own options are known once the method is."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from raydmd.config.overrides import apply_override, blamed, explain, first_error, shown_override, with_new_names
from raydmd.config.plugins import import_plugins
from raydmd.config.recipe import VERSION, MethodOptions, Recipe, read_tree
from raydmd.errors import UserError, nearest
from raydmd.methods.base import Method
from raydmd.methods.miniature import is_tiny, shrink
from raydmd.methods.registry import METHODS, find_method


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> Recipe:
    """Read a recipe by file or shipped name and apply ``key.path=value`` overrides (values are YAML).

    Its plugins are imported first. A recipe that comes from a stranger is read by `load_strangers_recipe`.

    Args:
        name_or_path: a file, or the name of a shipped recipe.
        overrides: of the command line.
        plugins: modules and files besides those that the recipe names.

    Raises:
        UserError: no such file, name or plugin, YAML that cannot be read, an unknown key or a value out of range.
    """
    tree, source = read_tree(name_or_path)
    wanted = _overridden(tree, overrides)
    given = [*_named(wanted), *plugins]
    check_version(tree, source)
    import_plugins(given)
    if is_tiny(wanted):
        wanted = _miniature(tree, wanted, source, overrides)
    if given:
        wanted["plugins"] = list(dict.fromkeys(given))
    return parse_recipe(wanted, source, overrides)


def load_strangers_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, as of a run's folder, without importing its plugins: a stranger's must not run code.

    Args:
        path: of the file.
        overrides: ``key.path=value`` of the command line.

    Raises:
        UserError: as `load_recipe`; its method or family comes from a plugin that was not given.
    """
    tree, source = read_tree(str(path))
    wanted = _overridden(tree, overrides)
    try:
        if is_tiny(wanted):
            wanted = _miniature(tree, wanted, source, overrides)
        return parse_recipe(wanted, source, overrides)
    except UserError as error:
        if not (named := _named(tree)):
            raise
        words = " ".join(f"--plugin {name}" for name in named)
        told = f"it names plugins, which are not imported from here; give them: {words}"
        raise UserError(f"{error} ({told})") from None


def check_version(tree: dict[str, Any], source: str) -> None:
    """Refuse a recipe of a form that this raydmd does not know yet.

    Raises:
        UserError: ``version: ...``.
    """
    version = tree.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{source}: version: {version} is newer than this raydmd's ({VERSION}); install a newer one")


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe's plain values with those of the command line."""
    made = copy.deepcopy(tree)
    for override in overrides:
        apply_override(made, override)
    return made


def _miniature(
    tree: dict[str, Any], wanted: dict[str, Any], source: str, overrides: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """Return the recipe in miniature, with the values of the command line as they are."""
    try:
        small = shrink(copy.deepcopy(tree), wanted)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    chosen = {key: small["teacher"][key] for key in ("path", "tiny")}
    made = _overridden(small, overrides)
    if isinstance(made.get("teacher"), dict):
        made["teacher"] |= chosen
    return made


def parse_recipe(tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validate a tree of plain values; ``source`` names it in errors.

    Args:
        tree: the values, with the overrides applied.
        source: where they are from, but for the overrides.
        overrides: ``key.path=value`` of the command line, which are blamed for what they did.

    Raises:
        UserError: one line that names the first wrong key and the nearest right one.
    """
    tree = with_new_names(tree, source)
    check_version(tree, source)
    section = tree.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    try:
        method = find_method(name) if isinstance(name, str) else None
    except UserError as error:
        by = next((each for each in reversed(overrides) if each.partition("=")[0] in ("method", "method.name")), None)
        raise UserError(f"{source if by is None else f'--set {shown_override(by)}'}: {error}") from None
    options = method.options_type if method is not None else MethodOptions
    model = Recipe if options is MethodOptions else create_model("Recipe", __base__=Recipe, method=(options, ...))
    if method is not None and isinstance(section, dict):
        _check_options(method, options, section, source)
    try:
        checked = model.model_validate(tree)
    except ValidationError as error:
        first = first_error(error)
        if first["type"] == "missing" and first["loc"][0] == "method":
            raise UserError(f"{source}: method.name: it is missing; one of {', '.join(METHODS)}") from None
        raise UserError(f"{blamed(error, overrides) or source}: {explain(error, model)}") from None
    recipe = Recipe(**{key: getattr(checked, key) for key in Recipe.model_fields})
    if method is not None:
        _check_roles(method(recipe), recipe, source)
    return recipe


def _named(tree: dict[str, Any]) -> list[str]:
    named = tree.get("plugins") or []
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _check_options(method: type[Method], options: type[MethodOptions], section: dict[str, Any], source: str) -> None:
    """Refuse options that are another method's."""
    for key in section:
        owners = [name for name, other in METHODS.items() if key in other.options_type.model_fields]
        if key not in options.model_fields and owners:
            raise UserError(f"{source}: method.{key}: an option of {', '.join(owners)}, not of {method.name}")


def _check_roles(method: Method, recipe: Recipe, source: str) -> None:
    """Refuse sections of roles that the method does not have."""
    for key, section, roles in (
        ("runtime", recipe.runtime, list(method.roles)),
        ("optimizer", recipe.optimizer, method.trained()),
    ):
        for role in section.model_extra or {}:
            if role not in roles:
                known = list(dict.fromkeys([*type(section).model_fields, *roles]))
                raise UserError(f"{source}: unknown key '{key}.{role}'{nearest(role, known)}")
