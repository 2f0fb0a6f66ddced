"""`raydmd pairs`: a teacher's ODE pairs, made once for many runs."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from raydmd.cli.options import FOLDER, plugin_option, recipe_argument, set_option
from raydmd.console import console
from raydmd.runtime.address import check_cluster


@click.command(epilog="Example: raydmd pairs digits-adp --set teacher.path=runs/digits-teacher --out runs/digits-pairs")
@recipe_argument
@set_option
@plugin_option
@click.option("--out", type=FOLDER, help="The pairs' folder; default the recipe's pairs.path, else runs/NAME-pairs.")
@click.option("--count", type=click.IntRange(min=1), help="How many; default as many as the recipe's method needs.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), help="Pairs of a file, a multiple of 256; default 256, or the folder's."
)
def pairs(
    recipe: str,
    overrides: Sequence[str],
    plugins: Sequence[str],
    out: Path | None,
    count: int | None,
    shard_size: int | None,
) -> None:
    """Have a teacher make the ODE pairs that runs train on, once for all of them, with Ray Data.

    RECIPE is a YAML file, or a name that `raydmd recipes` lists. What is there already is not made again.
    """
    from raydmd.methods.loading import load_recipe

    loaded = load_recipe(recipe, overrides, plugins)
    folder = out or Path(loaded.pairs.path or f"runs/{loaded.name}-pairs")
    check_cluster()
    from raydmd.runtime.pairs import collect_pairs

    made = collect_pairs(loaded, folder, count, shard_size, console)
    use = shlex.quote(f"pairs.path={folder}")
    words = f"pairs: {folder} ({made} shards made; use it with --set {use})"
    console.print(words if made else f"{folder} is complete: nothing to do", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip
