"""`raydmd recipes`: the shipped recipes and their keys."""

from collections.abc import Sequence

import click

from raydmd.cli.options import plugin_option, set_option
from raydmd.config.recipe import dump_recipe, listed_recipes
from raydmd.console import console
from raydmd.errors import UserError


@click.command(epilog="Example: raydmd recipes wan2.2-t2v-phased --explain method.score_interval")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--explain", "key", metavar="KEY", help="What a key means, what it takes, its default and value.")
@set_option
@plugin_option
def recipes(name: str | None, key: str | None, overrides: Sequence[str], plugins: Sequence[str]) -> None:
    """List the shipped recipes by family, or print one with every key and its value.

    NAME may be a file of yours, too.
    """
    if name is None:
        if key is not None or overrides:
            raise UserError("--explain, --set: of which recipe? `raydmd recipes NAME --explain KEY`")
        for line in listed_recipes():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    if key is not None:
        from raydmd.methods.explaining import explain_key

        for line in explain_key(name, key, tuple(overrides), tuple(plugins)).lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    from raydmd.methods.loading import load_recipe

    text = dump_recipe(load_recipe(name, overrides, plugins))
    console.print(text, highlight=False, markup=False, soft_wrap=True, end="")
