"""Joining a Ray cluster, or starting one on this machine, and bringing a run's actors up on it."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydmd.config import Recipe
from raydmd.errors import UserError
from raydmd.runtime.archivist import Archivist
from raydmd.runtime.controller import Cluster, micro_batches
from raydmd.runtime.groups import ScorerPool, TrainerGroup
from raydmd.runtime.placement import actor_options, describe, wait_placed, worker_device
from raydmd.runtime.prompts import PromptStream
from raydmd.runtime.recorder import Recorder
from raydmd.runtime.workers import PARTS, WORKERS, Factory


def connect(recipe: Recipe) -> bool:
    """Join the cluster that RAY_ADDRESS names (a job's own, inside a job), else start one here, on loopback.

    Returns:
        Whether one was started, which the caller then shuts down.

    Raises:
        UserError: nothing answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if "RAY_ADDRESS" in os.environ:
        _check_reachable(os.environ["RAY_ADDRESS"])
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS: {' '.join(str(error).split())}") from None
        return False
    roles = (recipe.runtime.teacher, recipe.runtime.fake, recipe.runtime.generator)
    claimed = sum(role.cpus * role.max_workers for role in roles)
    ray.init(
        "local",  # never some cluster that happens to run here
        num_cpus=max(os.cpu_count() or 1, int(claimed) + 2),  # two more for Ray Data's tasks
        object_store_memory=recipe.runtime.object_store_mb * 2**20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        **quiet,
    )
    return True


def _check_reachable(address: str) -> None:
    """Refuse an address at which nobody listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({error})") from None


async def launch(
    recipe: Recipe, folder: Path, prompts: str, recorder: Recorder, parts: dict[str, Factory] | None = None
) -> Cluster:
    """Start every role's workers, wait until they are placed, and form the groups.

    Args:
        recipe: the run's recipe.
        folder: the run's folder, on this node.
        prompts: the Parquet file of prompts.
        recorder: told what is waited for.
        parts: what builds each role's part; default: the real ones.
    """
    roles = {"generator": recipe.runtime.generator, "fake": recipe.runtime.fake, "teacher": recipe.runtime.teacher}
    workers: dict[str, list[Any]] = {
        name: [
            ray.remote(WORKERS[name])
            .options(**actor_options(role))
            .remote(recipe, number, role.threads, worker_device(role, recipe.runtime.device), (parts or PARTS)[name])
            for number in range(role.max_workers)
        ]
        for name, role in roles.items()
    }
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    local = prompts if "://" in prompts else f"local://{prompts}"  # only this node is sure to have it
    stream: Any = ray.remote(PromptStream).options(num_cpus=0, scheduling_strategy=here).remote(recipe, local)
    archivist = ray.remote(Archivist).options(num_cpus=0, scheduling_strategy=here)
    asks = {name: describe(role) for name, role in roles.items()} | {"prompts": f"the rows of {prompts}"}
    minimum = {name: role.min_workers for name, role in roles.items()} | {"prompts": 1}
    try:
        up = await wait_placed(
            {**workers, "prompts": [stream]}, minimum, asks, recipe.runtime.placement_timeout, recorder.say
        )
        cluster = Cluster(
            generators=TrainerGroup(up["generator"], micro_batches(recipe)),
            fakes=TrainerGroup(up["fake"], micro_batches(recipe)),
            scorers=ScorerPool(up["teacher"]),
            prompts=stream,
            archivist=archivist.remote(
                str(folder.resolve()),
                recipe.checkpoint.path or f"{folder.resolve()}/checkpoints",
                recipe.checkpoint.keep,
            ),
        )
        await cluster.generators.form()
        await cluster.fakes.form()
    except BaseException:
        for worker in (worker for group in workers.values() for worker in group):
            ray.kill(worker)
        ray.kill(stream)
        raise
    return cluster
