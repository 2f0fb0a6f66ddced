"""`raydmd encode`: texts to a table of embeddings."""

import shlex
from collections.abc import Sequence
from typing import Any

import click

from raydmd.cli.options import plugin_option, set_option
from raydmd.config.overrides import apply_override
from raydmd.console import console
from raydmd.errors import UserError
from raydmd.runtime.address import check_cluster


@click.command(epilog="Example: raydmd encode prompts.txt --recipe my-wan.yaml --out embeddings")
@click.argument("prompts", metavar="PROMPTS")
@click.option("--recipe", metavar="RECIPE", help="A YAML file or a shipped name, whose teacher and runtime are used.")
@click.option("--teacher", metavar="PATH", help="Instead: the teacher's folder, or hf://owner/name; with --family.")
@click.option("--family", metavar="NAME", help="The teacher's family.")
@set_option
@plugin_option
@click.option("--column", metavar="NAME", help="Of the texts; default text, prompt or caption.")
@click.option("--out", required=True, metavar="DIR", help="The table's folder, or a URI (s3://, gs://).")
def encode(
    prompts: str,
    recipe: str | None,
    teacher: str | None,
    family: str | None,
    overrides: Sequence[str],
    plugins: Sequence[str],
    column: str | None,
    out: str,
) -> None:
    """Encode texts by a teacher's text encoder into a table that runs take as prompts.path.

    PROMPTS is a .txt file (a prompt a line), a .csv, .jsonl or .parquet file with a column of texts, or a folder of
    pictures with captions. What is there already is not encoded again. A run does this by itself.
    """
    from raydmd.methods.loading import load_recipe, parse_recipe
    from raydmd.methods.registry import METHODS

    if (recipe is None) == (teacher is None) or (teacher is None) != (family is None):
        raise UserError("--recipe, --teacher: give --recipe RECIPE, or --teacher PATH and --family NAME")
    if recipe is not None:
        loaded = load_recipe(recipe, overrides, plugins)
    else:
        tree: dict[str, Any] = {"name": "encode", "teacher": {"path": teacher, "family": family}}
        tree["method"] = {"name": next(iter(METHODS))}  # whichever: nothing is trained
        for override in overrides:
            apply_override(tree, override)
        loaded = parse_recipe({**tree, "plugins": list(plugins)}, "encode", overrides)
    check_cluster()
    from raydmd.runtime.encode import encode_file

    encoded = encode_file(loaded, prompts, out, column, console)
    use = shlex.quote(f"prompts.path={encoded.place}")
    console.print(f"embeddings: {encoded.place} (use them with --set {use})", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip
