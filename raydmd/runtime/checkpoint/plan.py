"""What a run's manifests must say, given its recipe: a manifest that says otherwise is not the run's."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydmd.config.recipe import Recipe

if TYPE_CHECKING:
    from raydmd.methods.program import MethodTrace
    from raydmd.runtime.checkpoint.manager import Manifest


@dataclass(frozen=True)
class RunPlan:
    """The course of a run. It is small, whatever the run's length: it goes to actors.

    Attributes:
        recipe: the run's.
        ends: the iteration at which each phase ends.
        draws: of an iteration, by stream of prompts.
        student: the trained role that holds the experts.
    """

    recipe: Recipe
    ends: tuple[int, ...]
    draws: dict[str, int]
    student: str

    def phase_of(self, iteration: int) -> int:
        """Return the phase of an iteration; the number of phases when all is done."""
        return sum(end <= iteration for end in self.ends)

    def cursors(self, iteration: int) -> dict[str, int]:
        """Return how many samples have been taken from each stream of prompts before an iteration."""
        return {stream: iteration * count * self.recipe.batch.size for stream, count in self.draws.items()}

    def check(self, manifest: "Manifest") -> None:
        """See that a manifest can be this run's.

        Raises:
            ValueError: it cannot; says which of its values, and what the plan has instead.
        """
        n, phase = manifest.iteration, self.phase_of(manifest.iteration)
        if n > self.ends[-1]:
            raise ValueError(f"it is of iteration {n}, and the run has {self.ends[-1]}")
        expected = {"seed": self.recipe.seed, "phase": phase, "experts": phase, "cursors": self.cursors(n)}
        for name, value in expected.items():
            if getattr(manifest, name) != value:
                raise ValueError(f"{name} is {getattr(manifest, name)}, {value} in the run's plan")
        from raydmd.methods.program import trace_method  # and torch, which a run's first checkpoints do without

        trace = trace_method(self.recipe)
        before, last = trace.updates_before(n), min(n + 1 + self.recipe.runtime.max_staleness, trace.ends[-1])
        if manifest.updates.keys() != before.keys():
            raise ValueError(f"its roles are {sorted(manifest.updates)}, {sorted(before)} in the run's plan")
        for role, made in manifest.updates.items():
            # others than the student are ahead only where they trained on stale rollouts before a loss
            most = before[role] if role == self.student else trace.updates_before(last)[role]
            if not before[role] <= made <= most:
                raise ValueError(f"the {role}'s updates are {made}, {before[role]} in the run's plan")
        trained = set() if n in self.ends else set(before)
        names = trained | {f"expert-{index}" for index in range(phase)}
        if manifest.files.keys() != names:
            missing, more = sorted(names - manifest.files.keys()), sorted(manifest.files.keys() - names)
            raise ValueError(f"its files lack {missing}" if missing else f"its files have {more} besides")


def run_plan(recipe: Recipe, trace: "MethodTrace") -> RunPlan:
    """Return a recipe's plan.

    Args:
        recipe: the recipe.
        trace: what its method does.
    """
    return RunPlan(recipe, tuple(trace.ends), dict(Counter(trace.method.draws)), trace.method.student)
