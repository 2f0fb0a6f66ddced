"""Where a role's workers run: from the recipe's words to Ray's actor options, and saying what is waited for."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
import torch

from raydmd.config import Role
from raydmd.errors import UserError


def actor_options(role: Role) -> dict[str, Any]:
    """Return Ray's actor options for one worker of a role."""
    options: dict[str, Any] = {"num_cpus": role.cpus, "num_gpus": role.gpus, "resources": role.resources or None}
    if role.labels:
        options["label_selector"] = role.labels
    if role.fallbacks:
        options["fallback_strategy"] = [{"label_selector": labels} for labels in role.fallbacks]
    return {key: value for key, value in options.items() if value is not None}


def worker_device(role: Role, wanted: str) -> str:
    """Return the torch device of a role's workers: a GPU where the role claims one, or on demand.

    Raises:
        UserError: CUDA is asked for where the role claims no GPU in a machine without one.
    """
    if wanted == "auto":
        return "cuda" if role.gpus else "cpu"
    if wanted == "cuda" and not role.gpus and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda, but the role claims no gpus and this machine has none")
    return wanted


def describe(role: Role) -> str:
    """Say in words what one worker of a role asks for."""
    parts = [f"{role.cpus:g} CPU"] + ([f"{role.gpus:g} GPU"] if role.gpus else [])
    parts += [f"{amount:g} {name}" for name, amount in role.resources.items()]
    parts += [f"label {key}={value}" for key, value in role.labels.items()]
    return ", ".join(parts)


async def wait_placed(
    workers: dict[str, list[Any]], asks: dict[str, str], timeout: float, say: Callable[[str], None]
) -> None:
    """Wait until every worker is up; every 15 seconds say which role waits for what.

    Args:
        workers: actors by role.
        asks: in words, what a worker of each role asks for.
        timeout: seconds to wait in all.
        say: told what is waited for.

    Raises:
        UserError: the timeout ran out; names the role, what it asks for, and what the cluster has.
    """
    waiting = {asyncio.ensure_future(_ready(w)): role for role, group in workers.items() for w in group}
    end = time.monotonic() + timeout
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=max(0.0, min(15.0, end - time.monotonic())))
            for future in done:
                waiting.pop(future)
                future.result()
            if not done:
                words = "; ".join(
                    f"{list(waiting.values()).count(role)} {role} worker(s) wait for {asks[role]} each"
                    for role in dict.fromkeys(waiting.values())
                )
                if time.monotonic() >= end:
                    free = {key: f"{value:g}" for key, value in sorted(ray.available_resources().items())}
                    raise UserError(f"not placed within {timeout:g} s: {words}; free in the cluster: {free}")
                say(f"waiting: {words}")
    finally:
        for future in waiting:
            future.cancel()


async def _ready(worker: Any) -> Any:
    return await worker.ready.remote()
