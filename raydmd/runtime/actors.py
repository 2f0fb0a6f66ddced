"""Every actor of a run in one place."""

from dataclasses import dataclass
from typing import Any

import ray

from raydmd.runtime.membership.role_workers import RoleWorkers
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.trainer_group import TrainerGroup


@dataclass
class RunActors:
    """Every actor of a run: the roles' workers, how they are called, and the run's helpers.

    Attributes:
        role_workers: of every role.
        groups: how trained roles are called.
        pools: how frozen roles are called.
        prompts: the prompt stream.
        checkpoint_writer: writes manifests and experts.
        control_caller: asks workers beside their work.
    """

    role_workers: dict[str, RoleWorkers]
    groups: dict[str, TrainerGroup]
    pools: dict[str, ScorerPool]
    prompts: Any
    checkpoint_writer: Any
    control_caller: Any

    @property
    def sizes(self) -> dict[str, int]:
        """Workers at work, by role."""
        return {role: len(workers.active) for role, workers in self.role_workers.items()}

    @property
    def queued(self) -> int:
        """Micro-batches that no worker of a pool has begun to take."""
        return sum(pool.depth for pool in self.pools.values())

    def close(self) -> None:
        """End every actor, so that the run holds nothing of a cluster that others use; nothing where Ray is gone."""
        if not ray.is_initialized():
            return
        for workers in self.role_workers.values():
            workers.close()
        for actor in (self.prompts, self.checkpoint_writer, self.control_caller):
            ray.kill(actor)
