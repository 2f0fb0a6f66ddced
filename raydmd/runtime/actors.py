"""Every actor of a run in one place."""

from dataclasses import dataclass
from typing import Any

import ray

from raydmd.runtime.membership.role_workers import RoleWorkers
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.trainer_group import TrainerGroup

TRAINERS = ("generator", "fake")  # the roles that have a state


@dataclass
class RunActors:
    """Every actor of a run: the roles' workers, how they are called, and the run's helpers."""

    role_workers: dict[str, RoleWorkers]
    generators: TrainerGroup
    fakes: TrainerGroup
    scorers: ScorerPool
    prompts: Any
    checkpoint_writer: Any
    control_caller: Any

    @property
    def groups(self) -> dict[str, TrainerGroup]:
        """The trained roles' groups."""
        return {"generator": self.generators, "fake": self.fakes}

    @property
    def sizes(self) -> dict[str, int]:
        """Workers at work, by role."""
        return {role: len(self.role_workers[role].active) for role in ("teacher", "fake", "generator")}

    def close(self) -> None:
        """End every actor, so that the run holds nothing of a cluster that others use; nothing where Ray is gone."""
        if not ray.is_initialized():
            return
        for workers in self.role_workers.values():
            workers.close()
        for actor in (self.prompts, self.checkpoint_writer, self.control_caller):
            ray.kill(actor)
