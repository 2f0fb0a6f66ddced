"""Joining a Ray cluster, or starting one on this machine, and bringing a run's actors up on it."""

import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydmd.config import Recipe
from raydmd.errors import RunError, UserError
from raydmd.runtime.actors import Cluster
from raydmd.runtime.archivist import Archivist
from raydmd.runtime.controller import micro_batches
from raydmd.runtime.crew import Crew
from raydmd.runtime.groups import TrainerGroup
from raydmd.runtime.own_ray import in_a_group_of_its_own, make_room_for_sockets
from raydmd.runtime.placement import wait_for_helpers, wait_for_workers
from raydmd.runtime.pool import ScorerPool
from raydmd.runtime.process_group import Rendezvous
from raydmd.runtime.prompts import PromptStream
from raydmd.runtime.recorder import Recorder
from raydmd.runtime.warden import Warden
from raydmd.runtime.workers import PARTS, WORKERS, Factory


def connect(recipe: Recipe) -> bool:
    """Join the cluster that RAY_ADDRESS names (a job's own, inside a job), else start one here, on loopback.

    Returns:
        Whether one was started, which the caller then shuts down.

    Raises:
        UserError: RAY_ADDRESS names no cluster that can be joined.
        RunError: Ray does not start here.
    """
    roles = (recipe.runtime.teacher, recipe.runtime.fake, recipe.runtime.generator)
    claimed = sum(role.cpus * role.max_workers for role in roles) + 2  # two more for Ray Data's tasks
    return join_or_start(claimed, recipe.runtime.object_store_mb)


def join_or_start(claimed: float, object_store_mb: int) -> bool:
    """Join the cluster that RAY_ADDRESS names, else start one here, on loopback.

    Args:
        claimed: CPUs that are asked for in all; one that is started here has as many, whatever the machine has.
        object_store_mb: of one that is started here.

    Returns:
        Whether one was started, which the caller then shuts down.

    Raises:
        UserError: RAY_ADDRESS names no cluster that can be joined.
        RunError: Ray does not start here.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")  # of dead workers we tell in our own words
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if "RAY_ADDRESS" in os.environ:
        _check_reachable(os.environ["RAY_ADDRESS"])
        try:
            ray.init(**quiet)
        except Exception as error:  # nobody answers; another Ray or Python there; no token; an address of no such form
            raise UserError(f"RAY_ADDRESS: {' '.join(str(error).split())[:300]}") from None
        return False
    make_room_for_sockets()
    try:
        with in_a_group_of_its_own():
            ray.init(
                "local",  # never some cluster that happens to run here
                num_cpus=max(os.cpu_count() or 1, math.ceil(claimed)),
                object_store_memory=object_store_mb * 2**20,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as error:  # Ray raises no other kind, e.g. on a machine that is too busy to start it in time
        raise RunError(f"Ray does not start here: {' '.join(str(error).split())[:300]}") from error
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
    """Start every role's workers and wait until those are up that a run needs to begin.

    Args:
        recipe: the run's recipe.
        folder: the run's folder, on this node.
        prompts: the Parquet file of prompts.
        recorder: told what is waited for.
        parts: what builds each role's part; default: the real ones.

    Raises:
        UserError: workers cannot be placed.
        ray.exceptions.RayError: workers fail whenever they are started.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    def helper(kind: type, *arguments: Any) -> Any:
        """Start an actor beside the driver that comes back, and makes its unfinished calls again, when it is killed."""
        options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
        remote: Any = ray.remote(kind).options(**options)
        return remote.remote(*arguments)

    rows = prompts if "://" in prompts else str(Path(prompts).resolve())
    crews = {role: Crew(role, recipe, (parts or PARTS)[role]) for role in WORKERS}
    rendezvous = Rendezvous(ray.util.get_node_ip_address())
    cluster = Cluster(
        crews=crews,
        generators=TrainerGroup("generator", micro_batches(recipe), rendezvous),
        fakes=TrainerGroup("fake", micro_batches(recipe), rendezvous),
        scorers=ScorerPool(recipe.runtime.max_failures),
        prompts=helper(PromptStream, recipe, rows),
        archivist=helper(Archivist, str(folder.resolve()), checkpoints(recipe, folder), recipe.checkpoint.keep),
        warden=helper(Warden),
    )
    try:
        for crew in crews.values():
            crew.fill()
        await wait_for_workers(crews, recipe.runtime.placement_timeout, recorder.say)
        helpers = {f"the rows of {prompts}": cluster.prompts, "the place of checkpoints": cluster.archivist}
        await wait_for_helpers(helpers, recipe.runtime.placement_timeout, recorder.say)
    except BaseException:
        cluster.close()
        raise
    return cluster


def checkpoints(recipe: Recipe, folder: Path) -> str:
    """Return where a run's manifests are."""
    return recipe.checkpoint.path or str(folder.resolve() / "checkpoints")
