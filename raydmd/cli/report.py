"""`raydmd report`: a page of runs side by side."""

from collections.abc import Sequence
from pathlib import Path

import click

from raydmd.cli.options import FOLDER, run_plugin_option
from raydmd.console import console


@click.command(epilog="Example: raydmd report runs/digits runs/sgts --out report.html")
@click.argument("runs", metavar="RUN...", type=FOLDER, nargs=-1, required=True)
@run_plugin_option
@click.option("--out", type=FOLDER, help="The page; default report.html in the first run's folder.")
def report(runs: Sequence[Path], out: Path | None) -> None:
    """Write one self-contained HTML page: pictures side by side, curves, the table."""
    from raydmd.evaluation.report import report as write_report
    from raydmd.progress import telling
    from raydmd.runs.run import Run

    with telling("reporting") as say:
        page = write_report([Run(folder) for folder in runs], out or runs[0] / "report.html", say)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)
