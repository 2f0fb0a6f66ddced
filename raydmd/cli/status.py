"""`raydmd status`: what a run is doing."""

import time
from pathlib import Path

import click

from raydmd.cli.options import FOLDER
from raydmd.console import console


@click.command(epilog="Example: raydmd status runs/digits --watch")
@click.argument("run", metavar="RUN", type=FOLDER)
@click.option("--watch", is_flag=True, help="Show it once a second until the run has ended, or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print RUN/status.json, for programs.")
def status(run: Path, watch: bool, as_json: bool) -> None:
    """Show what a run is doing: its state, each worker's call, what is waited for.

    RUN may be on storage that this machine shares with the run's; its driver writes RUN/status.json once a second.
    """
    from raydmd.runs.status import describe, read_status

    while True:
        found = read_status(run)
        lines = [found.model_dump_json()] if as_json else describe(run, found)
        if watch and console.is_terminal:
            console.clear()
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if not watch or found.has_ended:
            return
        time.sleep(1.0)
