"""An elastic job of Ray Data: items shared out to a pool of actors, and what a lost one had given to another.

What is no fault of Ray's comes back as a result: Ray Data keeps neither an error's kind nor its message.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raydmd.atomic import write_text
from raydmd.config.recipe import Role
from raydmd.errors import RunError, StorageError, UserError
from raydmd.runtime.membership.placement import SAY_EVERY, actor_options, describe
from raydmd.runtime.ray_compat import living_actors

KIND, WORDS = "kind", "words"  # columns of a result that tell of an error
KINDS = {kind.__name__: kind for kind in (UserError, RunError, StorageError)}
GONE_S = 60.0  # within which a pool's processes have ended


def told(error: UserError | RunError | None) -> dict[str, np.ndarray]:
    """Return the columns of a result, each [1], that have `pool_results` raise an error; None: nothing is raised."""
    kind, words = ("", "") if error is None else (type(error).__name__, str(error))
    return {KIND: np.array([kind]), WORDS: np.array([words])}


def pool_results(
    items: Sequence[dict[str, Any]], worker: type, arguments: tuple[Any, ...], settings: Role
) -> Iterator[dict[str, Any]]:
    """Have actors of ``worker`` be called with one item at a time; yield what each call returns, in any order.

    The pool begins with as many actors as the role has workers, and runs with those that there is room for.

    Args:
        items: columns by name.
        worker: a class whose ``__call__`` takes an item's columns, each [1], and returns columns [1], `told` included.
        arguments: of its constructor.
        settings: where actors run, and how many there are at most.

    Raises:
        UserError, RunError: as a worker found; what others were at is not waited for.
        Exception: of several kinds, where Ray fails.
    """
    asked = min(settings.max_workers, len(items))  # all at once, as the roles of a run do: an autoscaler sees them
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=asked, initial_size=asked)
    with quiet_ray_data():
        dataset = ray.data.from_items(list(items), override_num_blocks=len(items)).map_batches(
            worker, fn_constructor_args=arguments, batch_size=1, batch_format="numpy", compute=pool,
            **actor_options(settings),
        )  # fmt: skip
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for place, kind in enumerate(batch[KIND]):
                if kind:
                    raise KINDS[str(kind)](str(batch[WORDS][place]))
                yield {name: column[place] for name, column in batch.items()}


def wait_until_gone(worker: type) -> None:
    """Wait until the processes of a pool that is done have ended, and their memory is free."""
    begin = time.monotonic()
    while living_actors(worker.__name__) and time.monotonic() - begin < GONE_S:
        time.sleep(0.05)


@contextmanager
def quiet_ray_data() -> Iterator[None]:
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


def wait_for_room(settings: Role, role: str, timeout: float, say: Callable[[str], None]) -> None:
    """Wait until one worker of a role has room: Ray Data would wait for ever, without a word.

    Raises:
        UserError: the timeout ran out; names what the role asks for, and what the cluster has.
    """
    options, begin = actor_options(settings), time.monotonic()
    answer = ray.remote(**options)(lambda: None).remote()  # sent as it is: no module is imported for it
    while not ray.wait([answer], timeout=min(SAY_EVERY, timeout))[0]:
        if time.monotonic() - begin >= timeout:
            ray.cancel(answer, force=True)
            free = {key: f"{value:g}" for key, value in sorted(ray.available_resources().items())}
            raise UserError(f"runtime.{role}: not placed within {timeout:g} s: {describe(settings)}; free in the "
                            f"cluster: {free}")  # fmt: skip
        say(f"waiting: a worker of {role} waits for {describe(settings)}")


def explained(error: Exception, file: Path) -> RunError:
    """Turn what ended the job into one line; what Ray says of it goes to a file."""
    with suppress(OSError, StorageError):
        write_text(file, str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return RunError(f"the job broke: {lines[-1][:300]} (details: {file}; the same command goes on)")
