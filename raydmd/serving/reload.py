"""Newer weights without a pause: whoever serves a run's folder looks at it from time to time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from raydmd.errors import UserError
from raydmd.runs import Run
from raydmd.serving.settings import Serving

logger = logging.getLogger("raydmd.serving")


async def follow(serving: Serving, served: str, refresh: Callable[[], Awaitable[str]]) -> None:
    """Call ``refresh`` whenever the weights in the run's folder have changed and then stayed the same for a look.

    Args:
        serving: names the folder (a link that is pointed at another run is a change, too) and how often to look.
        served: the revision that is served now.
        refresh: takes the weights over and returns their revision. What it cannot take is logged, once.
    """
    before: str | None = served
    while True:
        await asyncio.sleep(serving.reload_seconds)
        now = await asyncio.to_thread(_revision, serving.run)
        if now is not None and now == before and now != served:
            served = now
            try:
                logger.info("serving %s at revision %s", serving.run, await refresh())
            except Exception as error:  # whatever it is, the weights of before go on
                logger.warning("newer weights in %s are not taken over: %s", serving.run, error)
        before = now


def _revision(run: str) -> str | None:
    """Return the revision; None while the folder is not whole."""
    try:
        return Run(run).revision()
    except (UserError, OSError):
        return None
