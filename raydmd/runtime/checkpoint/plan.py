"""What a run's manifests must say, given its recipe: a manifest that says otherwise is not the run's."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydmd.methods.program import MethodTrace

if TYPE_CHECKING:
    from raydmd.config.recipe import Recipe
    from raydmd.runtime.checkpoint.manager import Manifest


@dataclass(frozen=True)
class RunPlan:
    """The course of a run.

    Attributes:
        ends: the iteration at which each phase ends.
        updates: by trained role, how many it has made before each iteration, and when all are done.
        draws: of an iteration, by stream of prompts.
        student: the trained role that holds the experts.
        batch: samples of a draw.
        seed: the recipe's.
    """

    ends: tuple[int, ...]
    updates: dict[str, tuple[int, ...]]
    draws: dict[str, int]
    student: str
    batch: int
    seed: int

    def phase_of(self, iteration: int) -> int:
        """Return the phase of an iteration; the number of phases when all is done."""
        return sum(end <= iteration for end in self.ends)

    def cursors(self, iteration: int) -> dict[str, int]:
        """Return how many samples have been taken from each stream of prompts before an iteration."""
        return {stream: iteration * count * self.batch for stream, count in self.draws.items()}

    def check(self, manifest: "Manifest") -> None:
        """See that a manifest can be this run's.

        Raises:
            ValueError: it cannot; says which of its values, and what the plan has instead.
        """
        n, phase = manifest.iteration, self.phase_of(manifest.iteration)
        if n > self.ends[-1]:
            raise ValueError(f"it is of iteration {n}, and the run has {self.ends[-1]}")
        expected = {"seed": self.seed, "phase": phase, "experts": phase, "cursors": self.cursors(n)}
        for name, value in expected.items():
            if getattr(manifest, name) != value:
                raise ValueError(f"{name} is {getattr(manifest, name)}, {value} in the run's plan")
        if manifest.updates.keys() != self.updates.keys():
            raise ValueError(f"its roles are {sorted(manifest.updates)}, {sorted(self.updates)} in the run's plan")
        for role, before in self.updates.items():
            # others than the student are ahead only where they trained on stale rollouts before a loss
            most = before[n] if role == self.student else before[self.ends[min(phase, len(self.ends) - 1)]]
            if not before[n] <= manifest.updates[role] <= most:
                raise ValueError(f"the {role}'s updates are {manifest.updates[role]}, {before[n]} in the run's plan")
        trained = set() if n in self.ends else set(self.updates)
        names = trained | {f"expert-{index}" for index in range(phase)}
        if manifest.files.keys() != names:
            missing, more = sorted(names - manifest.files.keys()), sorted(manifest.files.keys() - names)
            raise ValueError(f"its files lack {missing}" if missing else f"its files have {more} besides")


def run_plan(recipe: "Recipe", trace: MethodTrace) -> RunPlan:
    """Return a recipe's plan.

    Args:
        recipe: the recipe.
        trace: what its method does.
    """
    ends, method = tuple(trace.ends), trace.method
    updates = {
        role: tuple(trace.updates_before(n)[role] for n in range(ends[-1] + 1)) for role in method.trained()
    }  # fmt: skip
    return RunPlan(ends, updates, dict(Counter(method.draws)), method.student, recipe.batch.size, recipe.seed)
