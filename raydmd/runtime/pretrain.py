"""`raydmd pretrain`: an embedded teacher, trained with Ray Train (elastic, checkpointed)."""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file

from raydmd.config import Recipe, parse_recipe
from raydmd.console import console as terminal
from raydmd.data.embedded import EMBEDDED
from raydmd.errors import UserError
from raydmd.folders import read_lines
from raydmd.methods.collective import Alone, Collective
from raydmd.methods.pretraining import Pretraining
from raydmd.models.protocol import EmbeddedFamily, save_teacher, save_weights
from raydmd.progress import time_left
from raydmd.runs import recipe_family
from raydmd.runtime.cluster import connect
from raydmd.runtime.process_group import Distributed

REPORT_EVERY = 25


def pretrain(recipe: Recipe, folder: Path, console: Console | None = None) -> Path:
    """Train the recipe's embedded teacher into ``folder`` and return it.

    The weights do not depend on the number of workers. A run that was cut short goes on from its last checkpoint.
    On a cluster of several machines ``folder`` must be on storage that all of them share.

    Raises:
        UserError: the family is not an embedded one, or the folder already holds a teacher.
    """
    console, folder = console or terminal, folder.resolve()
    family, settings = _embedded_family(recipe), recipe.pretrain
    if (folder / "config.json").is_file():
        raise UserError(f"--out {folder}: it already holds a teacher; choose another folder")
    workers: Any = (settings.min_workers, settings.max_workers)  # a range is what makes Ray Train elastic
    progress_file = folder / "pretrain.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(
        train_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "progress": str(progress_file)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            resources_per_worker={"CPU": settings.cpus},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with connect(recipe, folder):
        with _progress(console, progress_file, settings.iterations):
            result = trainer.fit()
        assert result.checkpoint is not None
        training = Pretraining(recipe, family)
        with result.checkpoint.as_directory() as kept:
            training.flat.load_state(load_file(Path(kept) / "state.safetensors"))
    save_teacher(training.teacher(), folder, family.name, family.options)
    shutil.rmtree(folder / "train")
    return folder


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to the command: Ray Train's own handler swallows the first two and ends with 0."""


def train_loop(config: dict[str, Any]) -> None:
    """Train on one of Ray Train's workers, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    recipe = parse_recipe(config["recipe"], "recipe")
    training, settings = Pretraining(recipe, _embedded_family(recipe)), recipe.pretrain
    context, first = ray.train.get_context(), 0
    rank, world = context.get_world_rank(), context.get_world_size()
    collective: Collective = Distributed() if dist.is_initialized() and world > 1 else Alone()
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as kept:
            training.flat.load_state(load_file(Path(kept) / "state.safetensors"))
        first = training.flat.version
    for iteration in range(first, settings.iterations):
        loss, done = training.step(iteration, rank, world, collective), iteration + 1
        if rank == 0 and (done % REPORT_EVERY == 0 or done == settings.iterations):
            with open(config["progress"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": done, "loss": loss, "workers": world}) + "\n")
        if done % settings.checkpoint_every == 0 or done == settings.iterations:
            _report(training, {"iteration": done, "loss": loss}, rank)


def _report(training: Pretraining, metrics: dict[str, Any], rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept = None
        if rank == 0:
            save_weights(training.flat.state(), Path(folder) / "state.safetensors")
            kept = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=kept)


def _embedded_family(recipe: Recipe) -> EmbeddedFamily:
    teacher = recipe.teacher.model_copy(update={"path": None})
    family = recipe_family(recipe.model_copy(update={"teacher": teacher}))
    if not isinstance(family, EmbeddedFamily):
        raise UserError(f"teacher.family: '{family.name}' is not trained here (one of: {', '.join(EMBEDDED)})")
    return family


@contextmanager
def _progress(console: Console, file: Path, total: int) -> Iterator[None]:
    """Show the last line of the workers' progress file while inside."""
    columns = (
        TextColumn("[bold]teacher"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    done = threading.Event()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("teacher", total=total, figures="")

        def watch() -> None:
            said, first = 0, None
            while not done.wait(0.5):
                if lines := read_lines(file):
                    line, now = lines[-1], time.monotonic()
                    first = first or (lines[0]["iteration"], now)
                    figures = f"loss {line['loss']:.3f}  workers {line['workers']}"
                    bar.update(task, completed=line["iteration"], figures=figures)
                    if not console.is_terminal and line["iteration"] - said >= total // 5:
                        said = line["iteration"]
                        left = time_left(total - said, [(now - first[1]) / max(said - first[0], 1)])
                        console.print(f"teacher  {said}/{total}  {figures}, {left}", highlight=False)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
