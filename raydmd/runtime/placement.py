"""Where a role's workers run: from the recipe's words to Ray's actor options, and saying what is waited for."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray._private.state import state

from raydmd.config import Role
from raydmd.errors import UserError

if TYPE_CHECKING:
    from raydmd.runtime.crew import Crew

SAY_EVERY = 15.0
PATIENCE = 5.0
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


async def wait_for_workers(crews: "Mapping[str, Crew]", timeout: float, say: Callable[[str], None]) -> None:
    """Wait until every role has its minimum of workers up; now and then say which role waits for what.

    Those that Ray has placed by then are waited for, too, and those that it has not get `PATIENCE` seconds: they may
    join later.

    Args:
        crews: the roles' workers.
        timeout: seconds to wait for the minimum.
        say: told what is waited for.

    Raises:
        UserError: the timeout ran out; names the role, what it asks for, and what the cluster has.
        ray.exceptions.RayError: a role's workers fail whenever they are started.
    """
    begin = said = time.monotonic()
    while True:
        for crew in crews.values():
            if crew.failure is not None:
                raise crew.failure
        now = time.monotonic()
        waiting = {role: crew for role, crew in crews.items() if crew.coming}
        words = "; ".join(f"{len(c.coming)} {role} worker(s) wait for {c.asks} each" for role, c in waiting.items())
        if all(len(crew.arrived) >= crew.settings.min_workers for crew in crews.values()):
            coming = [actor for crew in waiting.values() for actor in crew.coming]
            if not await asyncio.to_thread(_any_placed, coming) and (not words or now - begin > PATIENCE):
                if words:
                    say(f"going on without: {words}")
                return
        elif now - begin > timeout:
            free = {key: f"{value:g}" for key, value in sorted(ray.available_resources().items())}
            raise UserError(f"not placed within {timeout:g} s: {words}; free in the cluster: {free}")
        if words and now - said > SAY_EVERY:
            said = now
            say(f"waiting: {words}")
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


def _any_placed(actors: list[Any]) -> bool:
    """Whether Ray has found a node for one of these."""
    tables = (state.actor_table(actor._actor_id.hex(), None, None) for actor in actors)
    return any(table.get("Pid") for table in tables)
