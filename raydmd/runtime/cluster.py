"""Joining a Ray cluster, or starting one on this machine, and bringing a run's actors up on it."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydmd import interrupts
from raydmd.config.plugins import workers_environment
from raydmd.config.recipe import Recipe
from raydmd.console import notices_to
from raydmd.data.prompts import PromptTable
from raydmd.errors import RunError, UserError
from raydmd.methods.program import MethodTrace, trace_method
from raydmd.methods.registry import build_method
from raydmd.runs.run import recipe_family
from raydmd.runtime import cluster_address
from raydmd.runtime.actors import RunActors
from raydmd.runtime.address import check_reachable
from raydmd.runtime.checkpoint.manager import Archive, Writer
from raydmd.runtime.checkpoint.plan import run_plan
from raydmd.runtime.checkpoint.writer import CheckpointWriter
from raydmd.runtime.membership.placement import wait_for_helpers, wait_for_workers
from raydmd.runtime.membership.role_workers import RoleWorkers
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.observability.status import StatusWriter
from raydmd.runtime.own_ray import make_room_for_sockets
from raydmd.runtime.prompts import PromptStream
from raydmd.runtime.ray_compat import (
    adopt_orphans,
    check_version,
    driver_prints_to,
    in_a_group_of_its_own,
    no_accidental_start,
    own_signals,
    quiet_dead_workers,
)
from raydmd.runtime.recovery.control_caller import ControlCaller
from raydmd.runtime.recovery.ray_health import RayHealthMonitor
from raydmd.runtime.workers.base import Factory
from raydmd.runtime.workers.helpers import start_helper
from raydmd.runtime.workers.process_group import Rendezvous
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.trainer_group import TrainerGroup
from raydmd.runtime.workers.wire import to_wire
from raydmd.training.messages import micro_batches


def connect(recipe: Recipe, folder: Path) -> AbstractContextManager[RayHealthMonitor]:
    """Join or start a Ray as `joined` does, large enough for a recipe; what Ray says goes to ``folder``/run.log."""
    roles = [recipe.runtime.of(role) for role in build_method(recipe).roles]
    encoder = recipe.runtime.encoder  # has done its work before the roles begin
    claimed = max(sum(role.cpus * role.max_workers for role in roles), encoder.cpus * encoder.workers)
    return joined(claimed + 2, recipe.runtime.object_store_mb, folder / "run.log")  # two for Ray Data's tasks


@contextmanager
def joined(claimed: float, object_store_mb: int, log: Path) -> Iterator[RayHealthMonitor]:
    """Join the cluster that RAY_ADDRESS names (a job's own, inside a job), else start one here, on loopback.

    One that was started is ended at the end; while inside, a Ray that is lost ends what the main thread does (see
    `RayHealthMonitor`). Within another of these it is the outer one's.

    Args:
        claimed: CPUs that are asked for in all; one that is started here has as many, whatever the machine has.
        object_store_mb: of one that is started here.
        log: file that is given what Ray says.

    Raises:
        UserError: RAY_ADDRESS names no cluster that can be joined; said within 15 s. This Ray is of a version that is
            not known.
        RunError: Ray does not start here.
    """
    inner = ray.is_initialized()
    with nullcontext() if inner else notices_to(log) as stream, driver_prints_to(stream):
        owned = join_or_start(claimed, object_store_mb)
        monitor = RayHealthMonitor()
        if not inner:
            monitor.start()
        try:
            yield monitor
        finally:
            monitor.stop()
            if owned and monitor.lost is None:
                ray.shutdown()


def join_or_start(claimed: float, object_store_mb: int) -> bool:
    """Do what `joined` says; return whether a Ray was started, which the caller then shuts down."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    check_version()
    quiet_dead_workers()
    no_accidental_start()
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    with own_signals():
        if (address := cluster_address()) is not None:
            check_reachable(address)
            try:
                ray.init(runtime_env=workers_environment() or None, **quiet)
            except Exception as error:  # another Ray or Python there; no node of it here
                raise UserError(f"RAY_ADDRESS: {' '.join(str(error).split())[:300]}") from None
            return False
        make_room_for_sockets()
        if interrupts.installed():
            adopt_orphans()
        try:
            with in_a_group_of_its_own():
                ray.init(
                    "local",  # never some cluster that happens to run here
                    num_cpus=max(os.cpu_count() or 1, math.ceil(claimed)),
                    object_store_memory=object_store_mb * 2**20,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    runtime_env=workers_environment() or None,
                    **quiet,
                )
        except Exception as error:  # Ray raises no other kind, e.g. on a machine that is too busy to start it in time
            raise RunError(f"Ray does not start here: {' '.join(str(error).split())[:300]}") from error
    return True


async def launch(
    recipe: Recipe,
    folder: Path,
    prompts: str,
    recorder: Recorder,
    parts: dict[str, Factory] | None = None,
    owner: str = "",
    status: StatusWriter | None = None,
    trace: MethodTrace | None = None,
) -> RunActors:
    """Start every role's workers and wait until those are up that a run needs to begin.

    Args:
        recipe: the run's recipe.
        folder: the run's folder, on this node.
        prompts: the Parquet file of prompts.
        recorder: told what is waited for.
        parts: what builds a role's part, by role; default: as the method has it.
        owner: the token under which this driver holds the place of the checkpoints; default: it does not.
        status: shows the workers while they start.
        trace: what the recipe's method does; default: it is made here.

    Raises:
        UserError: workers cannot be placed, or the place of the checkpoints not be reached.
        ray.exceptions.RayError: workers fail whenever they are started.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    helper = partial(start_helper, scheduling_strategy=here)
    place = checkpoints(recipe, folder)
    writer = Writer(owner, Archive(place).writers()) if owner else None
    trace = trace or trace_method(recipe)
    plan = run_plan(recipe, trace)
    rows = prompts if "://" in prompts else str(Path(prompts).resolve())
    family = recipe_family(recipe)
    row = to_wire(family.conditions(PromptTable(prompts, family.condition_columns).rows(0, 1)))
    method = trace.method
    role_workers = {role: RoleWorkers(role, recipe, (parts or {}).get(role), row=row) for role in method.roles}
    rendezvous = Rendezvous(ray.util.get_node_ip_address())
    actors = RunActors(
        role_workers=role_workers,
        groups={role: TrainerGroup(role, micro_batches(recipe), rendezvous) for role in method.trained()},
        pools={role: ScorerPool(recipe.runtime.max_failures) for role in method.frozen()},
        prompts=helper(PromptStream, recipe, rows),
        checkpoint_writer=helper(CheckpointWriter, str(folder.resolve()), place, recipe.checkpoint.keep, writer, plan),
        control_caller=helper(ControlCaller),
    )
    if status is not None:
        status.actors = actors
    try:
        for workers in role_workers.values():
            workers.fill()
        await wait_for_workers(role_workers, recipe.runtime.placement_timeout, recorder.say)
        helpers = {f"the rows of {prompts}": actors.prompts, "the place of checkpoints": actors.checkpoint_writer}
        helpers["the control caller"] = actors.control_caller
        await wait_for_helpers(helpers, recipe.runtime.placement_timeout, recorder.say)
    except BaseException:
        actors.close()
        raise
    return actors


def checkpoints(recipe: Recipe, folder: Path) -> str:
    """Return where a run's manifests are."""
    return recipe.checkpoint.path or str(folder.resolve() / "checkpoints")
