"""`raydmd evaluate`: a run's figures."""

from pathlib import Path
from typing import Any

import click
import yaml

from raydmd.cli.options import FOLDER, run_plugin_option
from raydmd.console import console


@click.command(epilog="Example: raydmd evaluate runs/digits")
@click.argument("run", metavar="RUN", type=FOLDER)
@run_plugin_option
@click.option("--samples", type=click.IntRange(min=50), help="Pictures to compare; default the recipe's.")
def evaluate(run: Path, samples: int | None) -> None:
    """Measure a run's students against their teacher and the data; writes RUN/evaluation.json."""
    evaluate_and_print(run, samples)


def evaluate_and_print(folder: Path, samples: int | None = None) -> None:
    """Measure a run, and print its figures."""
    from raydmd.evaluation.evaluate import evaluate_run
    from raydmd.progress import telling
    from raydmd.runs.run import Run

    with telling("evaluating") as say:
        figures = evaluate_run(Run(folder), samples=samples, progress=say)
    console.print(yaml.safe_dump(_rounded(figures), sort_keys=False), highlight=False, markup=False, end="")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value
