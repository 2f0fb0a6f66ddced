"""Where a role's workers run: from the recipe's words to Ray's actor options, and saying what is waited for."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
import torch

from raydmd.config.recipe import Role
from raydmd.errors import RunError, UserError
from raydmd.runtime.membership.unplaced import find_unplaced

if TYPE_CHECKING:
    from raydmd.runtime.membership.role_workers import RoleWorkers

SAY_EVERY = 15.0
PATIENCE = 5.0
START_PATIENCE_S = 15.0
SEE_EVERY_S = 0.5
REPORT_LAG_S = 5.0  # until Ray's report of what it has no room for tells of a new worker, on a busy machine
LOOK_EVERY = 0.1


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


async def wait_for_workers(
    role_workers: "Mapping[str, RoleWorkers]", timeout: float, say: Callable[[str], None]
) -> None:
    """Wait until every role has its minimum of workers up; now and then say which role waits for what.

    Those that are starting by then get as long again and `START_PATIENCE_S`, and those that Ray has no room for
    `PATIENCE` seconds: they may join later.

    Args:
        role_workers: the workers by role.
        timeout: seconds to wait for the minimum.
        say: told what is waited for.

    Raises:
        UserError: the timeout ran out; names the role, what it asks for, and what the cluster has.
        RunError: the timeout ran out, and nothing was lacking: workers do not come up.
        ray.exceptions.RayError: a role's workers fail whenever they are started.
    """
    begin = said = looked = time.monotonic()
    met: float | None = None
    while True:
        if time.monotonic() - looked > SEE_EVERY_S and any(workers.coming for workers in role_workers.values()):
            unplaced, looked = await asyncio.to_thread(find_unplaced, list(role_workers.values())), time.monotonic()
            for role, workers in role_workers.items():
                workers.see_placed(unplaced[role])
        for workers in role_workers.values():
            if workers.failure is not None:
                raise workers.failure
        now = time.monotonic()
        words = "; ".join(workers.words() for workers in role_workers.values() if workers.coming)
        waiting = any(workers.unplaced for workers in role_workers.values())
        if all(len(workers.arrived) >= workers.settings.min_workers for workers in role_workers.values()):
            met = now if met is None else met
            starting = any(len(workers.coming) > len(workers.unplaced) for workers in role_workers.values())
            patience = max(PATIENCE, met - begin + START_PATIENCE_S if starting else 0.0)
            if not words or now - (met if starting else begin) > patience:
                if words:
                    say(f"going on without: {words}")
                return
        elif now - begin > timeout + (0.0 if waiting else REPORT_LAG_S):
            if not waiting:
                raise RunError(f"not up within {timeout:g} s: {words}")
            free = {key: f"{value:g}" for key, value in sorted(ray.available_resources().items())}
            raise UserError(f"not placed within {timeout:g} s: {words}; free in the cluster: {free}")
        if words and now - said > SAY_EVERY:
            said = now
            say(f"{'waiting' if waiting else 'starting'}: {words}")
        await asyncio.sleep(LOOK_EVERY)


async def wait_for_helpers(helpers: Mapping[str, Any], timeout: float, say: Callable[[str], None]) -> None:
    """Wait until the run's helpers are up, by what each is for.

    Raises:
        UserError: one was not up in time.
        ray.exceptions.RayError: one failed.
    """
    for purpose, helper in helpers.items():
        answer, begin = asyncio.ensure_future(_ready(helper)), time.monotonic()
        while not (await asyncio.wait((answer,), timeout=SAY_EVERY))[0]:
            if time.monotonic() - begin > timeout:
                answer.cancel()
                raise UserError(f"{purpose}: not there within {timeout:g} s")
            say(f"waiting: {purpose}")
        answer.result()


async def _ready(helper: Any) -> Any:
    return await helper.ready.remote()
