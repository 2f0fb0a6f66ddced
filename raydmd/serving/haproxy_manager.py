"""Ray's actor that runs HAProxy, with eyes on it: HAProxy is started again as soon as it ends by itself."""

import asyncio
import logging
from typing import Any

from raydmd.runtime.ray_compat import serve_haproxy

haproxy = serve_haproxy()
logger = logging.getLogger("ray.serve")

PAUSE = 0.2  # seconds, between two tries to start it


class WatchedHAProxy(haproxy.HAProxyApi):  # type: ignore[name-defined]
    """Ray's HAProxy, watched by the process that started it.

    Ray itself looks at it now and then, and replaces the actor in the end: half a minute in which nobody is answered.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._turn = asyncio.Lock()  # starts and reloads come one after another
        self._stopping = False
        self._watches: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start HAProxy."""
        async with self._turn:
            await super().start()

    async def stop(self) -> None:
        """End HAProxy."""
        self._stopping = True
        for watch in self._watches:
            watch.cancel()
        await super().stop()

    async def _start_and_wait_for_haproxy(self, *arguments: Any, **named: Any) -> asyncio.subprocess.Process:
        process: asyncio.subprocess.Process = await super()._start_and_wait_for_haproxy(*arguments, **named)
        watch = asyncio.create_task(self._watch(process))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return process

    async def _graceful_reload(self) -> None:
        async with self._turn:
            try:
                await super()._graceful_reload()
            except Exception:
                if self._is_running():
                    raise
                self._proc = await self._start_and_wait_for_haproxy()  # it has just ended: the new one has the new file

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Start it again when it ends, unless another has its place."""
        code = await process.wait()
        while not self._stopping:
            async with self._turn:
                if self._proc is not process:
                    return
                logger.warning("HAProxy ended by itself (%s); it is started again", code)
                try:
                    self._proc = await self._start_and_wait_for_haproxy()
                    return
                except Exception:  # whatever it was, it may be over soon: a port, memory
                    logger.exception("HAProxy does not start")
            await asyncio.sleep(PAUSE)


def watch_haproxy() -> None:
    """Let the actor that Serve's controller starts use `WatchedHAProxy`.

    Called in the controller, which is told of it by `haproxy.SETTINGS`. The actor's class goes to its process with the
    names that it uses here.
    """
    haproxy.HAProxyApi = WatchedHAProxy
