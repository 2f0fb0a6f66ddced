"""`raydmd pairs`: the teacher's ODE pairs by an elastic job of Ray Data, a shard a task, into a folder of shards.

Pair k follows from the recipe and k alone, so any worker may make any shard, and make it again. Ray Data hands out the
shards that are missing, grows and shrinks the pool of actors, and gives what a lost one had to another; each shard is
written by the worker that made it, and only its name comes back.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import ray
import torch
from rich.console import Console

from raydmd.atomic import remove_parts, write_text, writing
from raydmd.config.recipe import PairsFolder, Recipe, Role
from raydmd.console import console as terminal
from raydmd.data.pair_shards import (
    INDEX_FILE,
    PairIndex,
    claim_index,
    missing_shards,
    read_index,
    refuse_other_things,
    write_shard,
)
from raydmd.data.prompts import PromptTable
from raydmd.data.trajectories import PAIR_CHUNK
from raydmd.errors import RunError, StorageError, UserError
from raydmd.methods.local import make_pairs
from raydmd.methods.pairs import pair_facts
from raydmd.methods.registry import build_method
from raydmd.models.embedded.prompts import ensure_embedded_prompts
from raydmd.models.fingerprint import fingerprint_teacher, same_teacher
from raydmd.progress import counting
from raydmd.recipe_check import absolute, check
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.lock import Claim
from raydmd.runtime.cluster import joined
from raydmd.runtime.membership.placement import SAY_EVERY, actor_options, describe, worker_device
from raydmd.runtime.preparation import pin_commit
from raydmd.runtime.workers.base import role_part

NUMBER, SHARD, KIND, WORDS = "number", "shard", "kind", "words"  # columns of the job's input, and of its output
KINDS = {kind.__name__: kind for kind in (UserError, RunError, StorageError)}


class ShardWorker:
    """An actor of Ray Data that has the teacher and makes shards; the folder has to be where it can write.

    Args:
        recipe: the recipe, with its teacher's place.
        folder: of the shards.
        prompts: the Parquet file of the prompts.
        index: what the folder's ``pairs.json`` says.
    """

    def __init__(self, recipe: Recipe, folder: str, prompts: str, index: PairIndex) -> None:
        self.folder, self.index, self.method = Path(folder), index, build_method(recipe)
        settings = recipe.runtime.of(self.method.teacher)
        torch.set_num_threads(settings.threads)
        self._misfit: UserError | RunError | None = None
        try:
            self.family = recipe_family(recipe)
            self._check(recipe)
            self.table = PromptTable(prompts, self.family.condition_columns)
            self.scorer = role_part(self.method.teacher, recipe, worker_device(settings, recipe.runtime.device))
        except (UserError, RunError) as error:
            self._misfit = error

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the shard of a number [1]; return its file's name, and the kind and the words of an error, each [1].

        What is no fault of Ray's comes back as a result: Ray Data keeps neither an error's kind nor its message.
        """
        name, kind, words = "", "", ""
        try:
            if self._misfit is not None:
                raise self._misfit
            name = self._make(int(rows[NUMBER][0]))
        except (UserError, RunError) as error:
            kind, words = type(error).__name__, str(error)
        return {SHARD: np.array([name]), KIND: np.array([kind]), WORDS: np.array([words])}

    def _make(self, number: int) -> str:
        start, count = self.index.span(number)
        pairs = make_pairs(self.method, self.family, self.scorer, self.table, count, self.index.chunk, start)
        return write_shard(self.folder, self.index, number, pairs)

    def _check(self, recipe: Recipe) -> None:
        """Refuse a machine that sees another folder or another teacher than the driver's."""
        if read_index(self.folder) != self.index:
            raise UserError(f"--out {self.folder}: a worker does not find {INDEX_FILE} there; the folder has to be on "
                            f"storage that all machines share")  # fmt: skip
        if not same_teacher(fingerprint_teacher(self.family), self.index.facts.teacher):
            raise UserError(f"teacher.path: a worker finds another teacher than the driver in '{recipe.teacher.path}'")


def collect_pairs(
    recipe: Recipe, folder: Path, count: int | None = None, shard_size: int | None = None,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Have a recipe's teacher make ODE pairs into ``folder``; return how many shards were made now.

    A folder that has some of its shards is completed: those that are whole, by their checksums, are kept. The teacher's
    workers are those of ``runtime.teacher``, from one up to its ``max_workers``.

    Args:
        recipe: the recipe; its ``pairs.path`` does not count.
        folder: of the shards; on a cluster of several machines on storage that all of them share.
        count: how many pairs; default: as many as the recipe's method needs.
        shard_size: pairs of a shard, whole chunks of `PAIR_CHUNK`; default: the folder's, else one chunk.
        console: where progress is shown; default: the terminal.

    Raises:
        UserError: a recipe that cannot be used, that names no teacher, or whose method needs no pairs; a folder that
            holds others, or at which another driver is at work; workers that cannot be placed.
        RunError: the job broke; a disk is full or gone.
    """
    folder, recipe = folder.resolve(), absolute(recipe.model_copy(update={"pairs": PairsFolder()}))
    total = count or build_method(recipe).pairs
    if not total:
        raise UserError(f"method.name: '{recipe.method.name}' needs no ODE pairs as it is set here; give --count N")
    if shard_size is not None and shard_size % PAIR_CHUNK:
        raise UserError(f"--shard-size {shard_size}: a shard is whole chunks of {PAIR_CHUNK} pairs; take "
                        f"{-(-shard_size // PAIR_CHUNK) * PAIR_CHUNK}")  # fmt: skip
    if recipe.teacher.path is None:
        raise UserError("teacher.path: pairs are of one teacher, and the recipe names none; `raydmd pretrain RECIPE "
                        "--out TEACHER` trains one, then --set teacher.path=TEACHER")  # fmt: skip
    there = read_index(folder)
    recipe = pin_commit(recipe, there.facts.teacher if there else "")
    check(recipe)
    with Claim([(f"--out {folder}", str(folder))]), writing(folder):
        remove_parts(folder)
        index, prompts = _begin(recipe, folder, total, shard_size or (there.shard_size if there else PAIR_CHUNK))
        missing = missing_shards(folder, index, thorough=True)
        if missing:
            _collect(recipe, folder, prompts, index, missing, console or terminal)
        return len(missing)


def _begin(recipe: Recipe, folder: Path, total: int, shard_size: int) -> tuple[PairIndex, str]:
    """Have the folder say what its shards are; return that, and the place of the prompts."""
    family = recipe_family(recipe)
    refuse_other_things(folder)
    prompts = recipe.prompts.path or str(ensure_embedded_prompts(family, folder / "prompts"))
    table = PromptTable(prompts, family.condition_columns)
    facts = pair_facts(recipe, family, table if family.condition_columns else None)
    return claim_index(folder, PairIndex(facts, total, shard_size)), prompts


def _collect(
    recipe: Recipe, folder: Path, prompts: str, index: PairIndex, missing: list[int], console: Console
) -> None:
    """Make the shards that are missing, on the Ray that is there or one that is started here."""
    settings = recipe.runtime.of(build_method(recipe).teacher)

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    if len(missing) < index.shards:
        say(f"{folder} has {index.shards - len(missing)} of {index.shards} shards: going on")
    claimed = settings.cpus * settings.max_workers + 2  # two more for Ray Data's own
    with joined(claimed, recipe.runtime.object_store_mb, folder / "run.log") as ray_health:
        try:
            _wait_for_room(settings, recipe.runtime.placement_timeout, say)
            with counting("shards", len(missing), None if console is terminal else console) as made:
                for _ in _shards(recipe, folder, prompts, index, missing):
                    made()
        except KeyboardInterrupt:
            left = len(missing_shards(folder, index))
            say(f"{folder} has {index.shards - left} of {index.shards} shards; the same command goes on")
            raise
        except (UserError, RunError):
            raise
        except Exception as error:  # Ray Data's are of several kinds
            raise ray_health.error() or _explained(error, folder) from None
    if lost := missing_shards(folder, index):
        raise RunError(f"--out {folder}: {len(lost)} of its shards are not there, though they were written")


def _shards(recipe: Recipe, folder: Path, prompts: str, index: PairIndex, missing: list[int]) -> Iterator[str]:
    """Have Ray Data make shards; yield each one's name once it is written.

    Raises:
        UserError, RunError: as a worker found; shards that others were at are not waited for.
    """
    settings = recipe.runtime.of(build_method(recipe).teacher)
    asked = min(settings.max_workers, len(missing))  # all at once, as the roles of a run do: an autoscaler sees them
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=asked, initial_size=asked)
    with _quiet_ray_data():
        numbers = ray.data.from_items([{NUMBER: number} for number in missing], override_num_blocks=len(missing))
        dataset = numbers.map_batches(
            ShardWorker, fn_constructor_args=(recipe, str(folder), prompts, index), batch_size=1, batch_format="numpy",
            compute=pool, **actor_options(settings),
        )  # fmt: skip
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for name, kind, words in zip(batch[SHARD], batch[KIND], batch[WORDS], strict=True):
                if kind:
                    raise KINDS[str(kind)](str(words))
                yield str(name)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """While inside, Ray Data shows no bars, and writes what it says where Ray's other notices go."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before, context.enable_progress_bars = context.enable_progress_bars, False
    kept, propagated, level = logger.handlers, logger.propagate, logger.level
    logger.handlers = [handler for handler in kept if not isinstance(handler, logging.StreamHandler)]
    logger.propagate = True
    logger.setLevel(logging.INFO)  # else a handler of the root's would be given all that is for debugging
    try:
        yield
    finally:
        context.enable_progress_bars, logger.handlers, logger.propagate = before, kept, propagated
        logger.setLevel(level)


def _wait_for_room(settings: Role, timeout: float, say: Callable[[str], None]) -> None:
    """Wait until one worker of the role has room: Ray Data would wait for ever, without a word.

    Raises:
        UserError: the timeout ran out; names what the role asks for, and what the cluster has.
    """
    options, begin = actor_options(settings), time.monotonic()
    answer = ray.remote(**options)(lambda: None).remote()  # sent as it is: no module is imported for it
    while not ray.wait([answer], timeout=min(SAY_EVERY, timeout))[0]:
        if time.monotonic() - begin >= timeout:
            ray.cancel(answer, force=True)
            free = {key: f"{value:g}" for key, value in sorted(ray.available_resources().items())}
            raise UserError(f"runtime.teacher: not placed within {timeout:g} s: {describe(settings)}; free in the "
                            f"cluster: {free}")  # fmt: skip
        say(f"waiting: a teacher worker waits for {describe(settings)}")


def _explained(error: Exception, folder: Path) -> RunError:
    """Turn what ended the job into one line; what Ray says of it goes to error.txt."""
    with suppress(OSError, StorageError):
        write_text(folder / "error.txt", str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return RunError(f"the job broke: {lines[-1][:300]} (details: {folder}/error.txt; the same command goes on)")
