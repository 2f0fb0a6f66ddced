"""Every actor of a run in one place."""

from dataclasses import dataclass
from typing import Any

import ray

from raydmd.runtime.membership.role_workers import Crew
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.trainer_group import TrainerGroup

TRAINERS = ("generator", "fake")  # the roles that have a state


@dataclass
class Cluster:
    """Every actor of a run: the roles' crews, how they are called, and the run's helpers."""

    crews: dict[str, Crew]
    generators: TrainerGroup
    fakes: TrainerGroup
    scorers: ScorerPool
    prompts: Any
    archivist: Any
    warden: Any

    @property
    def groups(self) -> dict[str, TrainerGroup]:
        """The trained roles' groups."""
        return {"generator": self.generators, "fake": self.fakes}

    @property
    def sizes(self) -> dict[str, int]:
        """Workers at work, by role."""
        return {role: len(self.crews[role].members) for role in ("teacher", "fake", "generator")}

    def close(self) -> None:
        """End every actor, so that the run holds nothing of a cluster that others use; nothing where Ray is gone."""
        if not ray.is_initialized():
            return
        for crew in self.crews.values():
            crew.close()
        for actor in (self.prompts, self.archivist, self.warden):
            ray.kill(actor)
