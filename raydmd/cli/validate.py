"""`raydmd validate`: check files offline."""

from collections.abc import Sequence
from pathlib import Path

import click

from raydmd.cli.options import FOLDER, run_plugin_option, set_option
from raydmd.config.recipe import shipped_recipes
from raydmd.console import console, errors
from raydmd.errors import UserError


@click.command(epilog="Example: raydmd validate cluster/aws.yaml cluster/kuberay/rayjob.yaml")
@click.argument("files", metavar="FILE...", type=FOLDER, nargs=-1, required=True)
@set_option
@run_plugin_option
@click.pass_context
def validate(context: click.Context, files: Sequence[Path], overrides: Sequence[str]) -> None:
    """Check recipes, cluster-launcher files and KubeRay manifests, with no cluster and no cloud.

    FILE may be a shipped recipe's name; --set goes with recipes. A line for each file; the exit code is 2 if one of
    them is wrong.
    """
    from raydmd.validation import inspect_file

    group = context.find_root().command
    assert isinstance(group, click.Group)
    wrong, shipped = 0, shipped_recipes()
    for file in files:
        place = file if file.exists() else shipped.get(str(file), file)
        try:
            words, checked = inspect_file(place, group.commands, overrides)
            found = "ok" if checked else "unknown"
            console.print(f"{found} {file} ({words})", highlight=False, markup=False, soft_wrap=True)
        except (UserError, OSError) as error:
            wrong += 1
            words = f"{file}: {error.strerror}" if isinstance(error, OSError) else str(error)
            errors.print(f"raydmd: {words}", highlight=False, markup=False, soft_wrap=True)
    if wrong:
        raise click.exceptions.Exit(2)
