"""`raydmd distill`: from a recipe and a folder to a finished run, or to one that can be continued."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from safetensors.numpy import load_file

from raydmd.config import Recipe, dump_recipe, load_recipe
from raydmd.data.prompts import ensure_embedded_prompts
from raydmd.errors import UserError
from raydmd.methods.plan import plan_iterations, plan_phases
from raydmd.runs import expert_file, recipe_family
from raydmd.runtime.cluster import connect, launch
from raydmd.runtime.controller import Controller
from raydmd.runtime.manifest import Archive, Manifest
from raydmd.runtime.recorder import Recorder
from raydmd.runtime.workers import Factory

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

    Args:
        recipe: the recipe; its teacher.path is set.
        folder: the run's folder.
        resume: ``auto`` continues what the folder holds, ``never`` refuses a folder that holds a run.
        console: where progress is shown.
        parts: what builds each role's part; default: the real ones.
        until: stop once this many iterations are committed.

    Raises:
        UserError: a bad recipe, a folder that holds another run, workers that cannot be placed.
    """
    console = console or Console()
    family = recipe_family(recipe)
    phases = plan_phases(recipe, family.schedule.t_max)
    lengths = plan_iterations(recipe, phases)
    start, states, experts = prepare(recipe, folder, resume)
    if start is not None and start.iteration == sum(lengths):
        console.print(f"{folder} is finished: nothing to do", highlight=False)
        return True
    prompts = recipe.prompts.path or str(ensure_embedded_prompts(family, folder / "prompts"))
    recorder = Recorder(folder, recipe, sum(lengths), start.iteration if start else 0, console)
    owned = connect(recipe)
    since = time.perf_counter()
    try:

        async def main() -> Controller:
            cluster = await launch(recipe, folder, prompts, recorder, parts)
            facts: dict[str, Any] = {"resumed": start.iteration} if start else {}
            recorder.event("started", workers=cluster.sizes, seconds=round(time.perf_counter() - since, 3), **facts)
            controller = Controller(recipe, phases, lengths, cluster, recorder, start, states, experts, until)
            loop = asyncio.get_running_loop()
            with _interrupts(loop, controller, recorder):
                await controller.run()
            return controller

        controller = asyncio.run(main())
        recorder.event(
            "finished" if controller.finished else "stopped",
            iteration=controller.committed,
            seconds=round(time.perf_counter() - since, 3),
        )
        return controller.finished
    finally:
        recorder.close()
        if owned:
            ray.shutdown()


def prepare(recipe: Recipe, folder: Path, resume: str) -> tuple[Manifest | None, dict[str, Any], list[Any]]:
    """Make the run's folder, or read what it holds: the newest manifest, trainers' states, finished experts.

    Raises:
        UserError: the folder holds a run and ``resume`` is ``never``, or the recipe is another one.
    """
    kept = folder / "recipe.yaml"
    if kept.is_file():
        if resume == "never":
            raise UserError(f"--out {folder}: it already holds a run; choose another folder, or --resume auto")
        _same_recipe(load_recipe(str(kept)), recipe, folder)
    elif folder.is_dir() and any(path.name not in ("teacher", "prompts") for path in folder.iterdir()):
        raise UserError(f"--out {folder}: it is not empty and holds no run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "recipe.yaml.part"
    part.write_text(dump_recipe(recipe), encoding="utf-8")
    part.replace(kept)
    found = Archive(f"{folder}/checkpoints", recipe.checkpoint.keep).newest()
    if found is None:
        return None, {}, []
    manifest, states = found
    return manifest, states, [load_file(expert_file(folder, index)) for index in range(manifest.experts)]


def _same_recipe(kept: Recipe, given: Recipe, folder: Path) -> None:
    ours, theirs = given.model_dump(mode="json"), kept.model_dump(mode="json")
    for key in ours:
        if key not in FREE and ours[key] != theirs[key]:
            name = _first_difference(ours[key], theirs[key], key)
            raise UserError(f"--out {folder}: it holds a run of another recipe ({name}); choose another folder")


def _first_difference(ours: Any, theirs: Any, key: str) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ours:
            if ours[name] != theirs.get(name):
                return _first_difference(ours[name], theirs.get(name), f"{key}.{name}")
    return f"{key}: {theirs} there, {ours} here"


class _interrupts:
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
