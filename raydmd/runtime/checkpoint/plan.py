"""What a run's manifests must say, given its recipe: a manifest that says otherwise is not the run's."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydmd.config.recipe import Recipe
    from raydmd.runtime.checkpoint.manager import Manifest


@dataclass(frozen=True)
class RunPlan:
    """The course of a run.

    Attributes:
        ends: the iteration at which each phase ends.
        fake_updates: of an iteration.
        batch: samples of a draw.
        seed: the recipe's.
    """

    ends: tuple[int, ...]
    fake_updates: int
    batch: int
    seed: int

    def phase_of(self, iteration: int) -> int:
        """Return the phase of an iteration; the number of phases when all is done."""
        return sum(end <= iteration for end in self.ends)

    def check(self, manifest: "Manifest") -> None:
        """See that a manifest can be this run's.

        Raises:
            ValueError: it cannot; says which of its values, and what the plan has instead.
        """
        n, phase = manifest.iteration, self.phase_of(manifest.iteration)
        if n > self.ends[-1]:
            raise ValueError(f"it is of iteration {n}, and the run has {self.ends[-1]}")
        first = n * self.fake_updates
        expected = {
            "seed": self.seed,
            "phase": phase,
            "experts": phase,
            "generator_version": n,
            "generator_cursor": n * self.batch,
            "fake_cursor": manifest.fake_version * self.batch,
        }
        for name, value in expected.items():
            if getattr(manifest, name) != value:
                raise ValueError(f"{name} is {getattr(manifest, name)}, {value} in the run's plan")
        # the fake is ahead only where it trained on stale rollouts before a loss
        most = self.ends[min(phase, len(self.ends) - 1)] * self.fake_updates
        if not first <= manifest.fake_version <= most:
            raise ValueError(f"fake_version is {manifest.fake_version}, {first} in the run's plan")
        trained = set() if n in self.ends else {"generator", "fake"}
        names = trained | {f"expert-{index}" for index in range(phase)}
        if manifest.files.keys() != names:
            missing, more = sorted(names - manifest.files.keys()), sorted(manifest.files.keys() - names)
            raise ValueError(f"its files lack {missing}" if missing else f"its files have {more} besides")


def run_plan(recipe: "Recipe", lengths: Sequence[int]) -> RunPlan:
    """Return a recipe's plan.

    Args:
        recipe: the recipe.
        lengths: iterations of each phase.
    """
    return RunPlan(tuple(accumulate(lengths)), recipe.method.fake_updates, recipe.batch.size, recipe.seed)
