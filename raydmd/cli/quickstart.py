"""`raydmd quickstart`: the whole path on this machine."""

from collections.abc import Sequence
from pathlib import Path

import click

from raydmd import interrupts
from raydmd.cli.distill import train_and_distil
from raydmd.cli.evaluate import evaluate_and_print
from raydmd.cli.options import FOLDER, set_option
from raydmd.console import console


@click.command(epilog="Example: raydmd quickstart --out runs/quickstart")
@click.option("--out", type=FOLDER, default=Path("runs/quickstart"), show_default=True, help="The run's folder.")
@set_option
def quickstart(out: Path, overrides: Sequence[str]) -> None:
    """Do it all on this machine: train a small teacher, distil it into 4 steps, evaluate, show a page.

    Takes minutes. Run again, it goes on where it was.
    """
    from raydmd.evaluation.report import report as write_report
    from raydmd.methods.loading import load_recipe
    from raydmd.runs.run import Run

    if not train_and_distil(load_recipe("digits", list(overrides)), out, "auto") or interrupts.received():
        raise click.exceptions.Exit(interrupts.exit_code())
    evaluate_and_print(out)
    page = write_report([Run(out)], out / "report.html")
    console.print(f"\nlook at the pictures: {page.resolve()}", highlight=False, soft_wrap=True)
    console.print(
        f"make more:            raydmd generate {out} --prompt 7 -n 16 --out pictures", highlight=False, soft_wrap=True
    )
