"""The commands. Bad input gets one line and exit code 2; Ctrl-C leaves a run that can be continued (130)."""

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import yaml
from rich.console import Console

from raydmd import __version__
from raydmd.config import Recipe, dump_recipe, load_recipe, shipped_recipes
from raydmd.errors import UserError

app = typer.Typer(
    help="Distil diffusion models into few-step experts on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, or a name that `raydmd recipes` lists")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]


@app.command(epilog="Example: raydmd quickstart --out runs/quickstart")
def quickstart(
    out: Annotated[Path, typer.Option(help="the run's folder")] = Path("runs/quickstart"), set_: SetOption = None
) -> None:
    """Do it all on this machine: train a small teacher, distil it into 4 steps, evaluate, show a page. Minutes."""
    from raydmd.evaluation.report import report as write_report
    from raydmd.runs import Run

    recipe = load_recipe("digits", set_)
    if not _distill(recipe, out, "auto"):
        raise typer.Exit(130)
    _evaluate(out)
    page = write_report([Run(out)], out / "report.html")
    console.print(f"\nlook at the pictures: {page.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"make more:            raydmd generate {out} --prompt 7 -n 16 --out pictures", highlight=False)


@app.command(epilog="Example: raydmd pretrain digits --set pretrain.iterations=3000 --out runs/digits-teacher")
def pretrain(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="the teacher's folder; default runs/NAME-teacher")] = None,
) -> None:
    """Train an embedded teacher with Ray Train."""
    from raydmd.runtime.pretrain import pretrain as run_pretrain

    loaded = load_recipe(recipe, set_)
    folder = run_pretrain(loaded, out or Path(f"runs/{loaded.name}-teacher"), console)
    console.print(f"teacher: {folder} (use it with --set teacher.path={folder})", highlight=False, soft_wrap=True)


@app.command(epilog="Example: raydmd distill digits --set method.name=dmd-sgts --set seed=1 --out runs/sgts")
def distill(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; default runs/NAME")] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="continue what the folder holds, refuse it, or continue PATH")
    ] = "auto",
) -> None:
    """Distil a teacher into few-step experts, on this machine or the Ray cluster of RAY_ADDRESS."""
    loaded = load_recipe(recipe, set_)
    folder = out or Path(f"runs/{loaded.name}")
    if resume not in ("auto", "never"):
        if not (Path(resume) / "recipe.yaml").is_file():
            raise UserError(f"--resume {resume}: neither auto, never nor the folder of a run")
        if out is not None and Path(resume).resolve() != out.resolve():
            raise UserError(f"--resume {resume}: --out {out} is another folder; give one of them")
        folder, resume = Path(resume), "auto"
    if not _distill(loaded, folder, resume):
        console.print(f"stopped; the same command goes on from {folder}", highlight=False, soft_wrap=True)
        raise typer.Exit(130)
    console.print(f"run: {folder} (next: raydmd evaluate {folder}, raydmd report {folder})", highlight=False)


@app.command(epilog="Example: raydmd evaluate runs/digits")
def evaluate(
    run: RunArgument,
    samples: Annotated[int | None, typer.Option(min=50, help="pictures to compare; default the recipe's")] = None,
) -> None:
    """Measure a run's students against their teacher and the data; writes RUN/evaluation.json."""
    _evaluate(run, samples)


@app.command(epilog="Example: raydmd report runs/digits runs/sgts --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="one or more runs' folders")],
    out: Annotated[Path | None, typer.Option(help="the page; default report.html in the first run")] = None,
) -> None:
    """Write one self-contained HTML page: pictures side by side, curves, the table."""
    from raydmd.evaluation.report import report as write_report
    from raydmd.runs import Run

    page = write_report([Run(folder) for folder in runs], out or runs[0] / "report.html")
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: raydmd generate runs/digits --prompt 7 -n 16 --seed 0 --out pictures")
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="what to make; for digits, the digit")],
    n: Annotated[int, typer.Option("-n", min=1, help="how many")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same pictures")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the PNGs")] = Path("pictures"),
) -> None:
    """Make pictures with a run's experts."""
    from raydmd.evaluation.pictures import generate as make
    from raydmd.runs import Run

    for path in make(Run(run), prompt, n, seed, out):
        console.print(str(path), highlight=False, soft_wrap=True)


@app.command(epilog="Example: raydmd recipes digits")
def recipes(name: Annotated[str | None, typer.Argument(help="print this one whole, defaults and all")] = None) -> None:
    """List the shipped recipes, or print one with every key."""
    if name is not None:
        console.print(dump_recipe(load_recipe(name)), highlight=False, markup=False, end="")
        return
    for key, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        console.print(f"{key:12} {first}", highlight=False, soft_wrap=True)


def _distill(recipe: Recipe, folder: Path, resume: str) -> bool:
    """Train the embedded teacher into the run's folder if none is given, then distil."""
    from raydmd.runtime.launch import distill as run_distill

    return run_distill(recipe, folder, resume, console)


def _evaluate(folder: Path, samples: int | None = None) -> None:
    from raydmd.evaluation.evaluate import evaluate_run
    from raydmd.runs import Run

    with console.status("evaluating"):
        figures = evaluate_run(Run(folder), samples=samples)
    console.print(yaml.safe_dump(_rounded(figures), sort_keys=False), highlight=False, markup=False, end="")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code. Used by the jobs, too."""
    errors = Console(stderr=True)
    try:
        code = typer.main.get_command(app)(arguments, prog_name="raydmd", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        console.print(error.format_message(), highlight=False, markup=False)
        return 2
    except (UserError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        errors.print(f"raydmd: {' '.join(message.split())}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        errors.print("raydmd: interrupted", highlight=False)
        return 130
