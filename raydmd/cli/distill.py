"""`raydmd distill`: train a run's experts."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from raydmd import interrupts
from raydmd.cli.options import FOLDER, plugin_option, recipe_argument, set_option
from raydmd.config.recipe import Recipe
from raydmd.console import console
from raydmd.errors import UserError
from raydmd.runtime.address import check_cluster


@click.command(epilog="Example: raydmd distill digits --set method.name=dmd-sgts --set seed=1 --out runs/sgts")
@recipe_argument
@set_option
@plugin_option
@click.option("--out", type=FOLDER, help="The run's folder; default runs/NAME.")
@click.option(
    "--resume",
    metavar="auto|never|PATH",
    default="auto",
    show_default=True,
    help="Continue what the folder holds, refuse a folder that holds a run, or continue the run in PATH.",
)
def distill(recipe: str, overrides: Sequence[str], plugins: Sequence[str], out: Path | None, resume: str) -> None:
    """Distil a teacher into few-step experts, on this machine or the Ray cluster of RAY_ADDRESS.

    RECIPE is a YAML file, or a name that `raydmd recipes` lists.
    """
    from raydmd.methods.loading import load_recipe

    loaded = load_recipe(recipe, overrides, plugins)
    folder = out or Path(f"runs/{loaded.name}")
    if resume not in ("auto", "never"):
        if not (Path(resume) / "recipe.yaml").is_file():
            raise UserError(f"--resume {resume}: neither auto, never nor the folder of a run")
        if out is not None and Path(resume).resolve() != out.resolve():
            raise UserError(f"--resume {resume}: --out {out} is another folder; give one of them")
        folder, resume = Path(resume), "auto"
    if not train_and_distil(loaded, folder, resume):
        console.print(f"stopped; the same command goes on from {folder}", highlight=False, soft_wrap=True)
        raise click.exceptions.Exit(interrupts.exit_code())
    then = ", ".join(next_commands(loaded, folder))
    console.print(f"run: {folder} (next: {then})", highlight=False, markup=False, soft_wrap=True)


def train_and_distil(recipe: Recipe, folder: Path, resume: str) -> bool:
    """Train the embedded teacher into the run's folder if none is given, then distil."""
    check_cluster()
    from raydmd.runtime.launch import distill as run_distill

    return run_distill(recipe, folder, resume, console)


def next_commands(recipe: Recipe, folder: Path) -> list[str]:
    """Return the commands that show a finished run, ready to be pasted; only those that this kind of run has."""
    from raydmd.evaluation.evaluate import has_figures

    place = shlex.quote(str(folder))
    return [f"raydmd evaluate {place}"] * has_figures(recipe) + [f"raydmd report {place}"]
