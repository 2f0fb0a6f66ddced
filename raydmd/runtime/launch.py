"""`raydmd distill`: from a recipe and a folder to a finished run, or to one that can be continued."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from raydmd.config import Recipe, dump_recipe, load_recipe, parse_recipe
from raydmd.data.embedded import EMBEDDED
from raydmd.data.prompts import PromptTable, ensure_embedded_prompts
from raydmd.errors import RunError, UserError
from raydmd.folders import expert_file
from raydmd.locations import absolute_location
from raydmd.methods.plan import plan_iterations, plan_phases
from raydmd.models.protocol import CONFIG_FILE, WEIGHTS_FILE
from raydmd.runs import recipe_family, with_teacher
from raydmd.runtime.archivist import keep_experts
from raydmd.runtime.cluster import checkpoints, connect, launch
from raydmd.runtime.controller import Controller
from raydmd.runtime.manifest import Archive
from raydmd.runtime.pretrain import pretrain
from raydmd.runtime.recorder import Recorder
from raydmd.runtime.storage import Store
from raydmd.runtime.workers import Factory

TEACHER = (f"teacher/{WEIGHTS_FILE}", f"teacher/{CONFIG_FILE}")  # in this order: with the last, it is whole
FREE = {"name", "runtime", "checkpoint", "monitor", "evaluation"}  # may differ when a run is continued


def distill(
    recipe: Recipe,
    folder: Path,
    resume: str = "auto",
    console: Console | None = None,
    parts: dict[str, Factory] | None = None,
    until: int | None = None,
) -> bool:
    """Distil by ``recipe`` into ``folder``; return whether the run is finished (else it was stopped).

    A recipe that names no teacher has its embedded one trained into ``folder/teacher`` first. Where checkpoints go
    elsewhere, it goes there, too, so that the same command goes on with an empty folder.

    Args:
        recipe: the recipe.
        folder: the run's folder.
        resume: ``auto`` continues what the folder holds, ``never`` refuses a folder that holds a run.
        console: where progress is shown.
        parts: what builds each role's part; default: the real ones.
        until: stop once this many iterations are committed.

    Raises:
        UserError: a bad recipe, a folder that holds another run, workers that cannot be placed.
    """
    console, recipe = console or Console(), absolute(recipe)
    check(recipe)
    done = prepare(recipe, folder, resume)
    own, recipe = recipe.teacher.path is None, with_teacher(recipe, folder)
    if own:
        fetch_teacher(recipe, folder)
    phases = plan_phases(recipe, recipe_family(recipe).schedule.t_max)
    lengths = plan_iterations(recipe, phases)
    if done == sum(lengths) and has_experts(recipe, folder, len(phases)):
        console.print(f"{folder} is finished: nothing to do", highlight=False, soft_wrap=True)
        return True
    trained = (folder / "teacher" / CONFIG_FILE).is_file()
    if own and done and not trained:
        raise UserError(f"--out {folder}: it lacks the teacher that the run trained; put it back: {folder}/teacher")
    owned = connect(recipe)
    recorder = None
    try:
        if own and not trained:
            pretrain(recipe, folder / "teacher", console)
        if own:
            archive_teacher(recipe, folder)
        prompts = recipe.prompts.path or str(ensure_embedded_prompts(recipe_family(recipe), folder / "prompts"))
        recorder = Recorder(folder, recipe, sum(lengths), console)

        async def main() -> Controller:
            since = time.perf_counter()
            cluster = await launch(recipe, folder, prompts, recorder, parts)
            try:
                controller = Controller(recipe, phases, lengths, cluster, recorder, until, since)
                with _Interrupts(asyncio.get_running_loop(), controller, recorder):
                    await controller.run()
            finally:
                cluster.close()
            seconds = round(time.perf_counter() - since, 3)
            kind = "finished" if controller.finished else "stopped"
            recorder.event(kind, iteration=controller.committed, seconds=seconds)
            return controller

        return asyncio.run(main()).finished
    except RayError as error:
        raise _explained(error, folder) from None
    finally:
        if recorder is not None:
            recorder.close()
        if owned:
            ray.shutdown()


def _explained(error: RayError, folder: Path) -> Exception:
    """Turn a worker's error into one line; what Ray says of it goes to error.txt."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError | RunError):
        return type(cause)(str(cause))
    (folder / "error.txt").write_text(str(error), encoding="utf-8")
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    first = lines[-1] if "creation task" in lines[0] else lines[0]
    return RunError(f"a worker ended the run: {first} (details: {folder}/error.txt; the same command goes on)")


def absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with local paths made absolute, so that it means the same elsewhere."""
    changes: dict[str, Any] = {}
    for name in ("teacher", "prompts"):
        section = getattr(recipe, name)
        if section.path is not None and Path(section.path).exists():
            changes[name] = section.model_copy(update={"path": str(Path(section.path).resolve())})
    if recipe.checkpoint.path is not None:
        place = absolute_location(recipe.checkpoint.path)
        changes["checkpoint"] = recipe.checkpoint.model_copy(update={"path": place})
    return recipe.model_copy(update=changes)


def check(recipe: Recipe) -> None:
    """Refuse what would fail later, before anything is written.

    Raises:
        UserError: a method, a teacher or a file of prompts that is not there or does not fit.
    """
    family = recipe_family(recipe)
    plan_iterations(recipe, plan_phases(recipe, family.schedule.t_max))
    if recipe.teacher.path is not None:
        family.load_teacher()
    elif family.name not in EMBEDDED:
        raise UserError(f"teacher.path: family '{family.name}' needs a folder or a hub's name of its weights")
    if recipe.prompts.path is not None:
        family.conditions(PromptTable(recipe.prompts.path, family.condition_columns).rows(0, 1))
    elif family.name not in EMBEDDED:
        raise UserError(f"prompts.path: family '{family.name}' ships no prompts; give a Parquet file")


def prepare(recipe: Recipe, folder: Path, resume: str) -> int:
    """Make the run's folder, or look into the one that is there; return how many iterations are committed.

    Raises:
        UserError: the folder, or the place of the checkpoints, holds a run and ``resume`` is ``never``, or the recipe
            is another one.
    """
    kept, archive = folder / "recipe.yaml", Archive(checkpoints(recipe, folder), recipe.checkpoint.keep)
    if kept.is_file():
        if resume == "never":
            raise UserError(f"--out {folder}: it already holds a run; choose another folder, or --resume auto")
        _same_recipe(load_recipe(str(kept)), recipe, f"--out {folder}")
    elif folder.is_dir() and any(path.name not in ("teacher", "prompts") for path in folder.iterdir()):
        raise UserError(f"--out {folder}: it is not empty and holds no run; choose another folder")
    elif recipe.checkpoint.path is not None and (there := archive.read_text("recipe.yaml")) is not None:
        if resume == "never":
            raise UserError("checkpoint.path: it already holds a run; choose another place, or --resume auto")
        _same_recipe(parse_recipe(yaml.safe_load(there), "checkpoint.path"), recipe, "checkpoint.path")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "recipe.yaml.part"
    part.write_text(dump_recipe(recipe), encoding="utf-8")
    part.replace(kept)
    if recipe.checkpoint.path is not None:
        archive.write_text("recipe.yaml", dump_recipe(recipe))
    newest = archive.peek()
    return newest.iteration if newest else 0


def has_experts(recipe: Recipe, folder: Path, count: int) -> bool:
    """Whether a finished run's folder, which may be a new head's, has its experts; they are fetched if it lacks one.

    Raises:
        UserError: the store cannot be reached.
    """
    if all(expert_file(folder, index).is_file() for index in range(count)):
        return True
    found = Archive(checkpoints(recipe, folder)).newest()
    if found.manifest is None or found.manifest.experts < count:  # the last one is broken: the run goes on from before
        return False
    keep_experts(folder, found.manifest, found.shards)
    return True


def fetch_teacher(recipe: Recipe, folder: Path) -> None:
    """Write the teacher that the run trained itself, where its folder, which may be a new head's, lacks it.

    Raises:
        UserError: the store cannot be reached.
    """
    if recipe.checkpoint.path is None or (folder / "teacher" / CONFIG_FILE).is_file():
        return
    archive, here = Archive(recipe.checkpoint.path), Store(str(folder))
    if archive.read_bytes(f"teacher/{CONFIG_FILE}") is not None:
        for name in TEACHER:
            here.write(name, [archive.read_bytes(name) or b""])


def archive_teacher(recipe: Recipe, folder: Path) -> None:
    """Have the teacher that the run trained itself where its checkpoints are.

    Raises:
        UserError: the store cannot be reached.
    """
    if recipe.checkpoint.path is None:
        return
    archive = Archive(recipe.checkpoint.path)
    if archive.read_bytes(f"teacher/{CONFIG_FILE}") is None:
        for name in TEACHER:
            archive.write_bytes(name, (folder / name).read_bytes())


def _same_recipe(kept: Recipe, given: Recipe, where: str) -> None:
    if kept.checkpoint.path != given.checkpoint.path:
        place = kept.checkpoint.path or "its folder"
        raise UserError(f"{where}: its checkpoints are in {place}, and checkpoint.path says otherwise")
    ours, theirs = given.model_dump(mode="json"), kept.model_dump(mode="json")
    for key in ours:
        if key not in FREE and ours[key] != theirs[key]:
            name = _first_difference(ours[key], theirs[key], key)
            raise UserError(f"{where}: it holds a run of another recipe ({name}); choose another place")


def _first_difference(ours: Any, theirs: Any, key: str) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ours:
            if ours[name] != theirs.get(name):
                return _first_difference(ours[name], theirs.get(name), f"{key}.{name}")
    return f"{key}: {theirs} there, {ours} here"


class _Interrupts:
    """While inside, the first Ctrl-C (or SIGTERM) stops the run at the iteration's edge; a second one at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, controller: Controller, recorder: Recorder) -> None:
        self.loop, self.controller, self.recorder = loop, controller, recorder
        self.task = asyncio.current_task()

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self._received)

    def __exit__(self, *exception: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.remove_signal_handler(number)

    def _received(self) -> None:
        if self.controller.stopping and self.task is not None:
            self.task.cancel()
            return
        self.recorder.say("stopping at the iteration's end; its checkpoint lets you go on (Ctrl-C again: at once)")
        self.controller.stop()
