"""`raydmd pretrain`: train an embedded teacher."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from raydmd.cli.options import FOLDER, plugin_option, recipe_argument, set_option
from raydmd.console import console
from raydmd.runtime.address import check_cluster


@click.command(epilog="Example: raydmd pretrain digits --set pretrain.iterations=3000 --out runs/digits-teacher")
@recipe_argument
@set_option
@plugin_option
@click.option("--out", type=FOLDER, help="The teacher's folder; default runs/NAME-teacher.")
def pretrain(recipe: str, overrides: Sequence[str], plugins: Sequence[str], out: Path | None) -> None:
    """Train an embedded teacher with Ray Train.

    RECIPE is a YAML file, or a name that `raydmd recipes` lists.
    """
    from raydmd.methods.loading import load_recipe

    loaded = load_recipe(recipe, overrides, plugins)
    check_cluster()
    from raydmd.runtime.pretrain import pretrain as run_pretrain

    folder = run_pretrain(loaded, out or Path(f"runs/{loaded.name}-teacher"), console)
    use = shlex.quote(f"teacher.path={folder}")
    console.print(f"teacher: {folder} (use it with --set {use})", highlight=False, markup=False, soft_wrap=True)
