"""The public Python API: what the commands do, as calls that raise where a command would exit.

A call works wherever Python runs: in a script, in a thread, and in a notebook's cell, where an event loop is running.
What the command line refuses in one line raises `UserError` with the same words; a run that broke, `RunError`.
"""

import asyncio
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console

from raydmd import interrupts
from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.evaluation.evaluate import Figures, evaluate_run
from raydmd.methods.loading import load_recipe as read_recipe
from raydmd.runs.run import Run

Result = TypeVar("Result")


def load_recipe(
    name_or_path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = (), plugins: Sequence[str] = ()
) -> Recipe:
    """Read a recipe and check it.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe, as `raydmd recipes` lists them.
        overrides: values by key (``{"iterations": 20, "batch.size": 64}``), or ``key=value`` texts as of ``--set``.
        plugins: modules and files to import first, besides those that the recipe names.

    Raises:
        UserError: no such recipe or plugin, an unknown key or a value out of range.

    Examples:
        >>> recipe = load_recipe("digits", {"iterations": 20, "batch.size": 32})
        >>> recipe.iterations, recipe.batch.size
        (20, 32)
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={_yaml(key, value)}" for key, value in overrides.items()]
    return read_recipe(str(name_or_path), list(overrides), list(plugins))


def distill(
    recipe: Recipe | str | Path, out: str | Path | None = None, *, resume: str = "auto", quiet: bool = False
) -> Run:
    """Distil a teacher into few-step experts, on this machine or on the Ray cluster of RAY_ADDRESS.

    An interrupt (a notebook's stop, Ctrl-C) ends the run after the iteration at hand, with a checkpoint from which
    the same call goes on; a second one raises KeyboardInterrupt at once.

    Args:
        recipe: as `load_recipe` returns it, or what that takes.
        out: the run's folder; default ``runs/NAME``.
        resume: ``auto`` continues what the folder holds, ``never`` refuses a folder that holds a run.
        quiet: show no progress.

    Returns:
        The run, finished or stopped (``run.finished``).

    Raises:
        UserError: a bad recipe, a folder that holds another run or at which another driver is at work.
        RunError: the run broke; the same call goes on from its last checkpoint.

    Examples:
        >>> run = distill("ring", "runs/ring")  # doctest: +SKIP
    """
    from raydmd.runtime.launch import distill as launch  # and Ray

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out) if out is not None else Path(f"runs/{recipe.name}")
    console = Console(file=io.StringIO()) if quiet else None
    outside_event_loop(lambda: launch(recipe, folder, resume, console))
    return Run(folder)


def evaluate(run: Run | str | Path, samples: int | None = None) -> Figures:
    """Measure a run's students against their teacher and the data.

    Args:
        run: it, or its folder.
        samples: how many to measure; default as its recipe says.

    Returns:
        What it has written into the run's ``evaluation.json``.

    Raises:
        UserError: no run there, no trained expert, no teacher, a family that has no figures, or too few samples.
    """
    return evaluate_run(run if isinstance(run, Run) else Run(run), samples)


def outside_event_loop(call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns; in a thread of its own where an event loop runs in this one, as in a notebook.

    There, the first interrupt asks the run in that thread to stop in order, and the second is raised.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(1, "raydmd") as threads:
        done = threads.submit(call)
        try:
            return done.result()
        except KeyboardInterrupt:
            if not interrupts.stop_other_thread():
                raise
            return done.result()


def _yaml(key: str, value: Any) -> str:
    """Return a value as one line of YAML.

    Raises:
        UserError: YAML has no such value.
    """
    try:
        value = str(value) if isinstance(value, Path) else value
        return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()
    except yaml.YAMLError:
        raise UserError(f"{key}: a recipe's values are plain, not of type {type(value).__name__}") from None
