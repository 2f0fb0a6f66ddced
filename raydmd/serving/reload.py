"""Newer weights without a pause: whoever serves a run's folder looks at it from time to time."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable

from raydmd.errors import UserError
from raydmd.runs.expert_index import index_file, read_index
from raydmd.runs.run import Run
from raydmd.serving.settings import Serving

logger = logging.getLogger("raydmd.serving")

LONGEST = 16  # looks left out at most between two tries of weights that could not be taken over


async def follow(serving: Serving, served: str, refresh: Callable[[], Awaitable[str]]) -> None:
    """Call ``refresh`` whenever the weights in the run's folder have changed and then stayed the same for a look.

    Args:
        serving: names the folder (a link that is pointed at another run is a change, too) and how often to look.
            Only folders with an index are taken over, and only as it says that they are.
        served: the revision that is served now.
        refresh: takes the weights over and returns their revision. What it cannot take is logged, once, and tried
            again: one look later, then two, four, and so on.
    """
    before: str | None = served
    failed: str | None = None
    why: str | None = None
    skip, pause = 0, 1  # looks, before the next try and after that
    while True:
        await asyncio.sleep(serving.reload_seconds)
        now, reason = await asyncio.to_thread(_revision, serving.run, served)
        if reason != why and reason is not None:
            logger.warning("newer weights in %s are not taken over yet: %s", serving.run, reason)
        why = reason
        settled, before = now is not None and now == before, now
        if now != failed:
            skip, pause = 0, 1
        if not settled or now == served:
            continue
        if skip:
            skip -= 1
            continue
        try:
            served = await refresh()
            logger.info("serving %s at revision %s", serving.run, served)
        except Exception as error:  # whatever it is, the weights of before go on
            if now != failed:
                logger.warning("newer weights in %s are not taken over: %s", serving.run, error)
            failed, skip, pause = now, pause, min(LONGEST, 2 * pause)


async def ask_stages(serving: Serving, refresh: Callable[[], Awaitable[str]]) -> None:
    """Call ``refresh`` at once, and then as often as stages look for newer weights: the API serves what they hold."""
    said = ""
    while True:
        try:
            await refresh()
            said = ""
        except Exception as error:  # stages that start or are lost; the next look is soon
            if str(error) != said:
                logger.warning("the stages of %s do not say what they hold: %s", serving.run, error)
            said = str(error)
        await asyncio.sleep(serving.reload_seconds)


def _revision(run: str, served: str) -> tuple[str | None, str | None]:
    """Return the revision, or None and why what is there is not taken: it is not whole, or nobody can tell."""
    try:
        opened = Run(os.path.realpath(run))
        revision = opened.revision()
        if revision != served and read_index(opened.folder) is None:
            raise UserError(f"there is no {index_file(opened.folder)}, by which one could tell that they are whole: "
                            f"start the server anew")  # fmt: skip
    except (UserError, OSError) as error:
        return None, str(error)
    return revision, None
