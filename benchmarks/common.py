"""What the benchmarks share: the machine's name, a teacher to work with, tables, and their JSON."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.methods.loading import load_recipe
from raydmd.models.base import Denoiser, EmbeddedFamily, Family, save_teacher
from raydmd.models.embedded.prompts import ensure_embedded_prompts
from raydmd.runs.run import recipe_family
from raydmd.training.pretraining import Pretraining

console = Console()


def arguments(description: str | None, **extra: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="folder of teachers and runs (default %(default)s)"
    )
    return parser


def machine() -> dict[str, Any]:
    """Return what it ran on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def teacher_folder(recipe: str, work: Path, seed: int = 0) -> Path:
    """Return the folder of a shipped recipe's embedded teacher; it is trained on the first call."""
    folder = work / f"teacher-{recipe}-{seed}"
    if not (folder / "config.json").is_file():
        loaded = load_recipe(recipe, [f"seed={seed}"])
        family = recipe_family(loaded)
        assert isinstance(family, EmbeddedFamily)
        console.print(f"training the {recipe} teacher (seed {seed}) once", highlight=False)
        training = Pretraining(loaded, family)
        from raydmd.training.collective import Alone

        for iteration in range(loaded.pretrain.iterations):
            training.step(iteration, 0, 1, Alone())
        save_teacher(training.teacher(), folder, family.name, family.options)
    return folder.resolve()


def open_recipe(
    name: str, work: Path, *overrides: str, teacher_seed: int = 0
) -> tuple[Recipe, Family, Denoiser, PromptTable]:
    """Return a shipped recipe with its teacher and prompts ready."""
    folder = teacher_folder(name, work, teacher_seed)
    recipe = load_recipe(name, [f"teacher.path={folder}", *overrides])
    family = recipe_family(recipe)
    prompts = PromptTable(ensure_embedded_prompts(family, work / "prompts"), family.condition_columns or None)
    return recipe, family, family.load_teacher(), prompts


def finish(title: str, figures: dict[str, Any], path: Path | None) -> None:
    """Print the scalar figures as a table and write all of them as JSON."""
    table = Table("figure", "value", title=title)
    for key, value in figures.items():
        if isinstance(value, int | float | str):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    if table.row_count:
        console.print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**figures, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
