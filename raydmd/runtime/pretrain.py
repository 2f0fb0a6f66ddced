"""`raydmd pretrain`: an embedded teacher, trained with Ray Train (elastic, checkpointed)."""

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file

from raydmd.atomic import remove_parts, storage_error, write_text, writing
from raydmd.config.recipe import Recipe
from raydmd.console import console as terminal
from raydmd.data.embedded import EMBEDDED
from raydmd.errors import RunError, StorageError, UserError
from raydmd.jsonl import LineWriter, mend_lines, read_lines
from raydmd.methods.loading import parse_recipe
from raydmd.models.base import EmbeddedFamily, save_teacher, save_weights
from raydmd.progress import time_left
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.lock import Claim
from raydmd.runtime.checkpoint.manager import file_sha256
from raydmd.runtime.cluster import connect
from raydmd.runtime.workers.process_group import ProcessGroup, Rendezvous
from raydmd.training.collective import Alone, Collective
from raydmd.training.pretraining import Pretraining

REPORT_EVERY = 25
PROGRESS, TRAIN, KEPT = "pretrain.jsonl", "train", "kept"  # in the teacher's folder, until it is trained
STATE, RECORD = "state.safetensors", "state.json"  # of a checkpoint


def pretrain(recipe: Recipe, folder: Path, console: Console | None = None) -> Path:
    """Train the recipe's embedded teacher into ``folder`` and return it.

    The weights do not depend on the number of workers. A run that was cut short goes on from its last whole checkpoint.
    On a cluster of several machines ``folder`` must be on storage that all of them share.

    Raises:
        UserError: the family is not an embedded one, the folder already holds a teacher, or another driver is at work
            on it.
        RunError: the training broke; a disk is full or gone.
    """
    console, folder = console or terminal, folder.resolve()
    family = _embedded_family(recipe)
    with Claim([(f"--out {folder}", str(folder))]):
        if (folder / "config.json").is_file():
            raise UserError(f"--out {folder}: it already holds a teacher; choose another folder")
        with writing(folder):
            remove_parts(folder)
            mend_lines(folder / PROGRESS)
            trained = salvage(folder)
            if trained < recipe.pretrain.iterations:
                _fit(recipe, folder, console)
                salvage(folder)
            training = Pretraining(recipe, family)
            training.flat.load_state(load_file(folder / KEPT / STATE))
            save_teacher(training.teacher(), folder, family.name, family.options)
            shutil.rmtree(folder / KEPT)
    return folder


def _fit(recipe: Recipe, folder: Path, console: Console) -> None:
    """Train to the end on Ray Train, from the kept state if there is one.

    Raises:
        RunError: the training broke; a disk is full or gone.
    """
    settings = recipe.pretrain
    workers: Any = (settings.min_workers, settings.max_workers)  # a range is what makes Ray Train elastic
    progress_file = folder / PROGRESS
    trainer = _Trainer(
        train_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "folder": str(folder)},
        torch_config=_OwnGroup(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            resources_per_worker={"CPU": settings.cpus},
        ),
        run_config=RunConfig(
            name=TRAIN,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with connect(recipe, folder):
        try:
            with shown_progress(console, progress_file, settings.iterations):
                trainer.fit()
        except TrainingFailedError as error:
            salvage(folder)
            raise _explained(error, folder) from None


def salvage(folder: Path) -> int:
    """Keep the newest whole state of a training that was cut short in ``kept``, and remove all else of it.

    Ray Train writes its own record of checkpoints in place: a full disk or a kill may leave half of it, and it does
    not start over that. So a training that goes on is a new one, whose first state is the kept one.

    Returns:
        The iterations that it was trained for; 0 where nothing is kept.
    """
    found = {path: _iterations_of(path) for path in (folder / KEPT, *(folder / TRAIN).glob("checkpoint_*"))}
    newest = max(found, key=lambda path: found[path])
    if found[newest] and newest != folder / KEPT:
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        newest.rename(folder / KEPT)
    shutil.rmtree(folder / TRAIN, ignore_errors=True)
    if not found[newest]:
        shutil.rmtree(folder / KEPT, ignore_errors=True)
    return found[newest]


def _iterations_of(checkpoint: Path) -> int:
    """Return the iterations of a checkpoint whose every bit is there; 0 for another."""
    try:
        record = json.loads((checkpoint / RECORD).read_bytes())
        if file_sha256(checkpoint / STATE) == record["sha256"]:
            return int(record["iteration"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return 0


def _explained(error: TrainingFailedError, folder: Path) -> RunError:
    """Turn what ended the training into one line; what Ray Train says of it goes to error.txt."""
    text = str(error)
    if found := re.search(r"StorageError: (.+)", text):
        return StorageError(found[1].strip())
    if found := re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", text):
        number = int(found[1] or found[2])
        if (known := storage_error(folder, OSError(number, os.strerror(number)))) is not None:
            return known
    with suppress(OSError, StorageError):
        write_text(folder / "error.txt", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return RunError(
        f"the teacher's training broke: {lines[-1]} (details: {folder}/error.txt; the same command goes on)"
    )


class _OwnGroup(TorchConfig):
    """Leaves the process group to the training loop: Ray Train's has a store that listens on every interface."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train sets up among the workers: nothing."""
        return Backend


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
    collective: Collective = Alone()
    if world > 1:
        rendezvous = Rendezvous(ray.util.get_node_ip_address()) if rank == 0 else None  # lives as long as the loop
        address = broadcast_from_rank_zero(rendezvous.address if rendezvous is not None else None)
        group = ProcessGroup(gpu=False)
        group.join(tuple(address), "pretrain", rank, world)
        collective = group
    folder = Path(config["folder"])
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as kept:
            training.flat.load_state(load_file(Path(kept) / STATE))
        first = training.flat.version
    elif (folder / KEPT).is_dir():
        training.flat.load_state(load_file(folder / KEPT / STATE))
        first = training.flat.version
    for iteration in range(first, settings.iterations):
        loss, done = training.step(iteration, rank, world, collective), iteration + 1
        if rank == 0 and (done % REPORT_EVERY == 0 or done == settings.iterations):
            with LineWriter(folder / PROGRESS) as progress:
                progress.append({"iteration": done, "loss": loss, "workers": world})
        if done % settings.checkpoint_every == 0 or done == settings.iterations:
            _report(training, {"iteration": done, "loss": loss}, rank)


def _report(training: Pretraining, metrics: dict[str, Any], rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept = None
        if rank == 0:
            state = Path(folder) / STATE
            save_weights(training.flat.state(), state)
            record = {"iteration": metrics["iteration"], "sha256": file_sha256(state)}
            (Path(folder) / RECORD).write_text(json.dumps(record))
            kept = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=kept)


def _embedded_family(recipe: Recipe) -> EmbeddedFamily:
    teacher = recipe.teacher.model_copy(update={"path": None})
    family = recipe_family(recipe.model_copy(update={"teacher": teacher}))
    if not isinstance(family, EmbeddedFamily):
        raise UserError(f"teacher.family: '{family.name}' is not trained here (one of: {', '.join(EMBEDDED)})")
    return family


@contextmanager
def shown_progress(console: Console, file: Path, total: int) -> Iterator[None]:
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
