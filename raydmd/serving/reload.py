"""Newer weights without a pause: whoever serves a run's folder looks at it from time to time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from raydmd.errors import UserError
from raydmd.runs import Run
from raydmd.serving.settings import Serving

logger = logging.getLogger("raydmd.serving")

LONGEST = 16  # looks left out at most between two tries of weights that could not be taken over


async def follow(serving: Serving, served: str, refresh: Callable[[], Awaitable[str]]) -> None:
    """Call ``refresh`` whenever the weights in the run's folder have changed and then stayed the same for a look.

    Args:
        serving: names the folder (a link that is pointed at another run is a change, too) and how often to look.
        served: the revision that is served now.
        refresh: takes the weights over and returns their revision. What it cannot take is logged, once, and tried
            again: one look later, then two, four, and so on.
    """
    before: str | None = served
    failed: str | None = None
    skip, pause = 0, 1  # looks, before the next try and after that
    while True:
        await asyncio.sleep(serving.reload_seconds)
        now = await asyncio.to_thread(_revision, serving.run)
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


def _revision(run: str) -> str | None:
    """Return the revision; None while the folder is not whole."""
    try:
        return Run(run).revision()
    except (UserError, OSError):
        return None
