"""`raydmd pairs`: the teacher's ODE pairs by an elastic job of Ray Data, a shard a task, into a folder of shards.

Pair k follows from the recipe and k alone, so any worker may make any shard, and make it again. Ray Data hands out the
shards that are missing, grows and shrinks the pool of actors, and gives what a lost one had to another; each shard is
written by the worker that made it, and only its name comes back.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from raydmd.atomic import remove_parts, writing
from raydmd.config.recipe import PairsFolder, Recipe
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
from raydmd.errors import RunError, UserError
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
from raydmd.runtime.encode import encode_recipe
from raydmd.runtime.membership.placement import worker_device
from raydmd.runtime.preparation import pin_commit
from raydmd.runtime.ray_data import explained, pool_results, told, wait_for_room
from raydmd.runtime.workers.base import role_part

NUMBER, SHARD = "number", "shard"  # columns of the job's input, and of its output


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
        """Make the shard of a number [1]; return its file's name, and what went wrong (`told`), each [1]."""
        name, error = "", self._misfit
        try:
            if error is None:
                name = self._make(int(rows[NUMBER][0]))
        except (UserError, RunError) as own:
            error = own
        return {SHARD: np.array([name]), **told(error)}

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
        refuse_other_things(folder)
        recipe = encode_recipe(recipe, folder, console)
        index, prompts = _begin(recipe, folder, total, shard_size or (there.shard_size if there else PAIR_CHUNK))
        missing = missing_shards(folder, index, thorough=True)
        if missing:
            _collect(recipe, folder, prompts, index, missing, console or terminal)
        return len(missing)


def _begin(recipe: Recipe, folder: Path, total: int, shard_size: int) -> tuple[PairIndex, str]:
    """Have the folder say what its shards are; return that, and the place of the prompts."""
    family = recipe_family(recipe)
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
            wait_for_room(settings, "teacher", recipe.runtime.placement_timeout, say)
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
            raise ray_health.error() or explained(error, folder / "error.txt") from None
    if lost := missing_shards(folder, index):
        raise RunError(f"--out {folder}: {len(lost)} of its shards are not there, though they were written")


def _shards(recipe: Recipe, folder: Path, prompts: str, index: PairIndex, missing: list[int]) -> Iterator[str]:
    """Have Ray Data make shards; yield each one's name once it is written.

    Raises:
        UserError, RunError: as a worker found; shards that others were at are not waited for.
    """
    settings = recipe.runtime.of(build_method(recipe).teacher)
    items = [{NUMBER: number} for number in missing]
    for result in pool_results(items, ShardWorker, (recipe, str(folder), prompts, index), settings):
        yield str(result[SHARD])
