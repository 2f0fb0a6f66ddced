"""Arguments and options that several commands have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)
recipe_argument = click.argument("recipe", metavar="RECIPE")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)


def _import(context: click.Context, option: click.Parameter, value: Sequence[str]) -> Sequence[str]:
    from raydmd.config.plugins import import_plugins

    import_plugins(value)
    return value


_PLUGIN: dict[str, Any] = {
    "multiple": True, "metavar": "MODULE|FILE.py", "callback": _import,
    "help": "Import code that registers a method or a family.",
}  # fmt: skip
plugin_option = click.option("--plugin", "plugins", **_PLUGIN)  # for a command that reads a recipe
run_plugin_option = click.option("--plugin", "plugins", expose_value=False, **_PLUGIN)  # for one that reads a run


base_option = click.option(
    "--base", metavar="PATH", help="Of an export: its base model's folder, or hf://owner/name; default as it says."
)
