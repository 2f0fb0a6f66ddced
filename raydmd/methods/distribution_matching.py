"""What DMD and its few-step forms have in common: one iteration, and phases made of the step grid."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from raydmd.errors import UserError
from raydmd.methods.base import STUDENT, TEACHER, Frozen, Method, Program, Trained
from raydmd.sampling.grid import count_phases, count_steps, phase_grids
from raydmd.sampling.phase import Phase, make_phase
from raydmd.sampling.plan import check_intervals
from raydmd.training.fake_score import Fake


class DistributionMatching(Method):
    """The generator follows the teacher's score less the fake score's, which tracks the generator (DMD Sec. 3).

    Attributes:
        steps: network calls of the student where the recipe does not say.
        experts: phases where the recipe does not say.
        gradient: which calls of a rollout keep their graph.
    """

    roles: Mapping[str, Trained | Frozen] = {
        "generator": STUDENT, "fake": Trained(Fake), "teacher": TEACHER,
    }  # fmt: skip
    steps: ClassVar[int] = 4
    experts: ClassVar[int] = 1
    gradient: ClassVar[Literal["sgts", "vanilla"]] = "sgts"

    def rollouts(self, run: Program, n: int) -> list[Any]:
        """The generator's samples for each of the fake score's updates."""
        return [run.generator.rollout(n, u, run.prompts(n, u)) for u in range(self.options.fake_updates)]

    def iteration(self, run: Program, n: int, rollouts: list[Any]) -> None:
        """Train the fake score on the rollouts, then the generator on both scores of its proposal."""
        for samples in rollouts:
            run.fake.update(samples)
        proposal = run.generator.propose(n, run.prompts(n, self.options.fake_updates))
        run.generator.update(run.teacher.score(proposal), run.fake.score(proposal))

    def prepare(self, run: Program, n: int) -> None:
        """Let earlier experts, which are frozen, begin the next rollouts."""
        if run.phase(n).index:
            run.generator.prepare(n, *(run.prompts(n, draw) for draw in range(len(self.draws))))

    @property
    def draws(self) -> tuple[str, ...]:
        """One for each of the fake score's updates, then the generator's own."""
        return ("fake",) * self.options.fake_updates + ("generator",)

    def phases(self, t_max: float) -> list[Phase]:
        """Give each expert its run of the step grid."""
        options = self.options
        steps, count = count_steps(options, self.steps), count_phases(options, self.experts)
        self.check_counts(steps, count)
        if steps % count and (options.times is None or options.boundaries is None):
            raise UserError(f"method.steps: {steps} steps do not divide into {count} phases")
        grids = phase_grids(options, steps, count, t_max)
        phases = [make_phase(options, k, grid, self.gradient, t_max) for k, grid in enumerate(grids)]
        check_intervals(self.recipe, phases)
        return phases

    def check_counts(self, steps: int, count: int) -> None:
        """Refuse what a method of one phase, without regression, does not have."""
        if count != 1:
            raise UserError(f"method.phases: {self.name} has 1 phase, not {count}; for more, method.name: phased")
        self.check_regression()

    def check_regression(self) -> None:
        """Refuse regression on ODE pairs."""
        if self.options.regression.weight:
            raise UserError(f"method.regression.weight: regression on ODE pairs goes with dmd, not {self.name}")
