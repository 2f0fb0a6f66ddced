"""Where a role's workers run: from the recipe's words to Ray's actor options, and saying what is waited for."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
import torch

from raydmd.config import Role
from raydmd.errors import UserError

SAY_EVERY = 15.0
PATIENCE = 30.0


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
    workers: dict[str, list[Any]],
    minimum: dict[str, int],
    asks: dict[str, str],
    timeout: float,
    say: Callable[[str], None],
) -> dict[str, list[Any]]:
    """Wait for the workers to be up, and return those that are; now and then say which role waits for what.

    Once every role has its minimum, the others get `PATIENCE` more seconds and are then given up.

    Args:
        workers: actors by role.
        minimum: how many of each role are needed to begin.
        asks: in words, what a worker of each role asks for.
        timeout: seconds to wait for the minimum.
        say: told what is waited for.

    Raises:
        UserError: the timeout ran out; names the role, what it asks for, and what the cluster has.
    """
    waiting = {asyncio.ensure_future(_ready(w)): (role, w) for role, group in workers.items() for w in group}
    up: dict[str, list[Any]] = {role: [] for role in workers}
    end, enough = time.monotonic() + timeout, False
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=max(0.0, min(SAY_EVERY, end - time.monotonic())), return_when=asyncio.FIRST_COMPLETED
            )
            for future in done:
                role, worker = waiting.pop(future)
                future.result()
                up[role].append(worker)
            if not enough and all(len(up[role]) >= minimum[role] for role in workers):
                enough, end = True, time.monotonic() + PATIENCE
            if not done:
                left = [role for role, _ in waiting.values()]
                words = "; ".join(
                    f"{left.count(role)} {role} worker(s) wait for {asks[role]} each" for role in dict.fromkeys(left)
                )
                if time.monotonic() < end:
                    say(f"waiting: {words}")
                elif enough:
                    say(f"going on without: {words}")
                    break
                else:
                    free = {key: f"{value:g}" for key, value in sorted(ray.available_resources().items())}
                    raise UserError(f"not placed within {timeout:g} s: {words}; free in the cluster: {free}")
    finally:
        for future, (_, worker) in waiting.items():
            future.cancel()
            ray.kill(worker)
    return {role: [worker for worker in group if worker in up[role]] for role, group in workers.items()}


async def _ready(worker: Any) -> Any:
    return await worker.ready.remote()
