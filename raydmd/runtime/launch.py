"""`raydmd distill`: from a recipe and a folder to a finished run, or to one that can be continued."""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path

from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from raydmd.atomic import write_text
from raydmd.config.recipe import Recipe
from raydmd.console import console as terminal
from raydmd.errors import RunError, StorageError, UserError
from raydmd.evaluation.validation_prompts import check_validation_prompts
from raydmd.interrupts import graceful
from raydmd.methods.program import MethodTrace, trace_method
from raydmd.models.base import CONFIG_FILE
from raydmd.models.embedded.prompts import ensure_embedded_prompts
from raydmd.models.fingerprint import fingerprint_teacher
from raydmd.models.initial_student import fingerprint_initial
from raydmd.recipe_check import absolute, check, check_encoded, miniature_note, notes, with_tiny_teacher
from raydmd.runs.run import make_teacher, note_table, recipe_family, with_teacher
from raydmd.runtime.checkpoint.lock import Claim, claim_run
from raydmd.runtime.cluster import checkpoints, connect, launch
from raydmd.runtime.controller import Controller
from raydmd.runtime.encode import check_same_texts, encode_recipe
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.observability.status import StatusWriter
from raydmd.runtime.observability.weights_and_biases import check_wandb
from raydmd.runtime.preparation import (
    archive_teacher,
    check_fingerprint,
    check_initial_student,
    fetch_teacher,
    has_experts,
    pin_teacher,
    prepare,
)
from raydmd.runtime.recovery.state import State
from raydmd.runtime.workers.base import Factory

log = logging.getLogger("raydmd.runtime.launch")


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
        parts: what builds a role's part, by role; default: as the method has it.
        until: stop once this many iterations are committed.

    Raises:
        UserError: a bad recipe, a folder that holds another run or at which another driver is at work, workers that
            cannot be placed.
        RunError: the run broke; a disk is full or gone.
    """
    console, given = console or terminal, absolute(recipe)
    recipe = pin_teacher(given, folder)
    with with_tiny_teacher(recipe) as checked:
        check(checked)
        check_validation_prompts(checked, recipe_family(checked))
        check_wandb(recipe)
        said = [*miniature_note(recipe), *notes(checked)]
    for note in said:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    with claim_run(folder, checkpoints(recipe, folder)) as claim:
        return _claimed(given, recipe, folder, resume, console, parts, until, claim)


def _claimed(
    given: Recipe,
    recipe: Recipe,
    folder: Path,
    resume: str,
    console: Console,
    parts: dict[str, Factory] | None,
    until: int | None,
    claim: Claim,
) -> bool:
    """Do what `distill` does, in a folder and a place of checkpoints that are this driver's."""

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    done = prepare(given, folder, resume, claim.owner, say)
    make_teacher(recipe, folder)
    own = recipe.teacher.path is None and not recipe.teacher.is_made
    recipe = with_teacher(recipe, folder)
    if own:
        fetch_teacher(recipe, folder)
    trained = (folder / "teacher" / CONFIG_FILE).is_file()
    if done and (trained or not own):
        check_fingerprint(recipe, folder, fingerprint_teacher(recipe_family(recipe)))
    trace = trace_method(recipe, recipe_family(recipe).schedule.t_max)
    if done:
        check_initial_student(recipe, folder, _initial(recipe, trace))
        check_same_texts(recipe, folder)
    if done == trace.ends[-1] and has_experts(recipe, folder, len(trace.phases), say, claim.owner):
        console.print(f"{folder} is finished: nothing to do", highlight=False, soft_wrap=True)
        return True
    if own and done and not trained:
        raise UserError(f"--out {folder}: it lacks the teacher that the run trained; put it back: {folder}/teacher")
    with connect(recipe, folder) as ray_health, StatusWriter(folder, done, trace.ends) as status:
        try:
            return _distill(recipe, folder, own, trained, trace, console, parts, until, claim, status)
        except (RayError, RunError) as error:
            raise ray_health.error() or _explained(error, folder) from None


def _distill(
    recipe: Recipe,
    folder: Path,
    own: bool,
    trained: bool,
    trace: MethodTrace,
    console: Console,
    parts: dict[str, Factory] | None,
    until: int | None,
    claim: Claim,
    status: StatusWriter,
) -> bool:
    """Do what is left to do on the Ray that is there; return whether the run is finished."""
    if own and not trained:
        from raydmd.runtime.pretrain import pretrain  # and Ray Train, which takes a while

        pretrain(recipe, folder / "teacher", console)
    if own:
        archive_teacher(recipe, folder, claim.owner)
    family = recipe_family(recipe)
    if (line := family.quantization_note()) is not None:
        log.info("%s", line)
    fingerprint = fingerprint_teacher(family)
    given, recipe = recipe, encode_recipe(recipe, folder, console)
    if recipe is not given:
        check_encoded(recipe)
        note_table(folder, str(recipe.prompts.path))
    prompts = recipe.prompts.path or str(ensure_embedded_prompts(recipe_family(recipe), folder / "prompts"))
    recorder = Recorder(folder, recipe, trace.ends[-1], console, claim, status.state)

    async def main() -> Controller:
        since = time.perf_counter()
        actors = await launch(recipe, folder, prompts, recorder, parts, claim.owner, status, trace)
        loop = asyncio.get_running_loop()
        try:
            controller = Controller(recipe, trace, actors, recorder, until, since, fingerprint, _initial(recipe, trace))
            status.controller = controller

            def stop() -> None:
                recorder.say("stopping at the iteration's end; its checkpoint lets you go on (Ctrl-C again: at once)")
                controller.stop()

            with graceful(lambda: loop.call_soon_threadsafe(stop)):
                await controller.run()
        finally:
            actors.close()
        seconds = round(time.perf_counter() - since, 3)
        status.state.enter(kind := State.FINISHED if controller.finished else State.STOPPED)
        recorder.event(kind, iteration=controller.committed, seconds=seconds)
        return controller

    try:
        return asyncio.run(main()).finished
    finally:
        recorder.close()


def _initial(recipe: Recipe, trace: MethodTrace) -> str:
    """Return the fingerprint of the student that experts start from; "" where it is the teacher."""
    return fingerprint_initial(recipe.method.init, len(trace.phases)) if recipe.method.init is not None else ""


def _explained(error: Exception, folder: Path) -> Exception:
    """Turn a worker's error into one line; what Ray says of it goes to error.txt."""
    if isinstance(error, RunError) and not isinstance(error, RayError):  # a worker's comes as both, with a traceback
        return error
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError | RunError):
        return type(cause)(str(cause))
    with suppress(OSError, StorageError):
        write_text(folder / "error.txt", str(error))
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    first = lines[-1] if "creation task" in lines[0] else lines[0]
    return RunError(f"a worker ended the run: {first} (details: {folder}/error.txt; the same command goes on)")
