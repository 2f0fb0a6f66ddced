"""A caller beside the run: what it asks of workers does not queue behind the run's own calls to them."""

import asyncio
import os
from typing import Any

import ray

from raydmd.runtime.workers.helpers import HelperHeartbeat


class ControlCaller:
    """An actor that asks many workers at once and gives up on those that do not answer.

    Ray sends one caller's calls to an actor in order, each once its arguments are there. A call of the driver's would
    so wait behind calls that wait for the very worker it is to free.
    """

    async def ready(self) -> None:
        """Return once it is up."""

    @ray.method(max_task_retries=0)
    async def heartbeat(self) -> HelperHeartbeat:
        """Say that it is there."""
        return HelperHeartbeat(os.getpid(), None, 0)

    async def ask(self, workers: list[Any], method: str, arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        """Call ``method(*arguments)`` on each worker; return answers, or the error in its place.

        A worker that does not answer within ``timeout`` seconds gets a TimeoutError.
        """

        async def one(worker: Any) -> Any:
            try:
                async with asyncio.timeout(timeout):
                    return await getattr(worker, method).remote(*arguments)
            except Exception as error:
                return error

        return list(await asyncio.gather(*(one(worker) for worker in workers)))
