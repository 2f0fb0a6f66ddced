"""The group of all commands."""

from typing import Any

import click

from raydmd import __version__
from raydmd.bench.command import bench
from raydmd.cli.distill import distill
from raydmd.cli.encode import encode
from raydmd.cli.evaluate import evaluate
from raydmd.cli.export import export
from raydmd.cli.generate import generate
from raydmd.cli.pairs import pairs
from raydmd.cli.pretrain import pretrain
from raydmd.cli.quickstart import quickstart
from raydmd.cli.recipes import recipes
from raydmd.cli.report import report
from raydmd.cli.serve import serve
from raydmd.cli.status import status
from raydmd.cli.validate import validate


class Commands(click.Group):
    """A group that a Ctrl-C leaves without the empty line that click writes for it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def app() -> None:
    """Distil diffusion models into few-step experts on a Ray cluster."""


for command in (
    quickstart, pretrain, pairs, encode, distill, status, evaluate, report, generate, export, serve, bench, recipes,
    validate,
):  # fmt: skip
    app.add_command(command)
