"""What a method does, told without doing it: its calls, its updates, and from which states a run can go on."""

from itertools import accumulate
from typing import Any

import pytest

from raydmd.methods.base import Method, Program
from raydmd.methods.loading import load_recipe
from raydmd.methods.phased import PhasedDMD
from raydmd.methods.program import CallNode, MethodTrace, trace_method
from raydmd.sampling.plan import plan_iterations


def trace_of(*overrides: str) -> MethodTrace:
    return trace_method(load_recipe("ring", ["method.fake_updates=2", "iterations=[4, 3]", *overrides]))


def words(calls: list[CallNode]) -> list[str]:
    return [f"{call.role}.{call.name}@{call.at}" for call in calls]


def test_an_iteration_is_its_calls_in_order_each_named_by_the_updates_before_it() -> None:
    trace = trace_of()
    assert words(trace.iteration(3).calls) == [
        "generator.rollout@3", "generator.rollout@3", "fake.update@6", "fake.update@7", "generator.propose@3",
        "teacher.score@0", "fake.score@8", "generator.update@3",
    ]  # fmt: skip
    assert [call.early for call in trace.iteration(3).calls] == [True, True, *[False] * 6]
    assert trace.updates_before(3) == {"generator": 3, "fake": 6} and trace.updates_before(7)["fake"] == 14
    first, second = trace.iteration(0).calls[:2]
    assert first.arguments == (0, 0) and second.arguments == (0, 1) and first.inputs[0] is not second.inputs[0]


def test_what_can_be_prepared_is_of_later_phases() -> None:
    trace = trace_of()
    assert words(trace.preparation(3).calls) == []
    (call,) = trace.preparation(5).calls
    assert call.name == "prepare" and call.arguments == (5,) and len(call.inputs) == 3


@pytest.mark.parametrize(
    ("committed", "needed"),
    [
        ({"generator": 3, "fake": 6}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"generator": 3, "fake": 7}, [1, 3, 4, 5, 6, 7]),  # the first rollout was for that update only
        ({"generator": 3, "fake": 8}, [4, 5, 6, 7]),
        ({"generator": 4, "fake": 8}, []),
    ],
)
def test_an_iteration_that_is_repeated_leaves_out_what_is_done(committed: dict[str, int], needed: list[int]) -> None:
    trace = trace_of().iteration(3)
    assert [trace.calls.index(call) for call in trace.needed(committed)] == needed


@pytest.mark.parametrize(
    ("generator", "fake", "staleness", "right", "iteration"),
    [
        (3, 6, 0, True, 3),
        (3, 7, 0, True, 3),
        (3, 8, 0, True, 3),
        (4, 8, 0, True, 4),
        (3, 9, 0, False, 3),  # it would have trained on rollouts of a generator that is not there yet
        (3, 9, 1, True, 3),
        (3, 10, 1, True, 3),
        (3, 11, 1, False, 3),
        (4, 7, 0, False, 3),  # the rollout that the fake needs is of weights that are gone
        (4, 7, 1, False, 3),
        (4, 6, 0, False, 3),
        (3, 5, 0, False, 2),
        (7, 14, 0, True, 7),
        (7, 13, 0, False, 6),
    ],
)
def test_a_run_goes_on_only_from_states_that_each_call_can_be_made_in(
    generator: int, fake: int, staleness: int, right: bool, iteration: int
) -> None:
    trace, updates = trace_of(), {"generator": generator, "fake": fake}
    assert trace.complete(updates) == iteration
    assert trace.consistent(updates, staleness) is right


class Odd(PhasedDMD):
    name = "odd"

    def iteration(self, run: Any, n: int, rollouts: Any) -> None:
        getattr(self, self.options.solver)(run, rollouts)

    def euler(self, run: Any, rollouts: Any) -> None:
        run.critic.update(rollouts[0])

    def renoise(self, run: Any, rollouts: Any) -> None:
        run.teacher.update(rollouts[0])


class Backwards(PhasedDMD):
    name = "backwards"

    def iteration(self, run: Program, n: int, rollouts: Any) -> None:
        run.fake.update(rollouts[0], n)


class Hasty(PhasedDMD):
    name = "hasty"

    def rollouts(self, run: Program, n: int) -> Any:
        run.fake.update(run.generator.rollout(n, 0, run.prompts(n, 0)))


@pytest.mark.parametrize(
    ("kind", "solver", "error", "told"),
    [
        (Odd, "euler", AttributeError, "odd has no role 'critic'; its roles: generator, fake, teacher"),
        (Odd, "renoise", TypeError, "teacher.update: the role is frozen"),
        (Backwards, "euler", TypeError, "plain arguments come before"),
        (Hasty, "euler", TypeError, "makes no update"),
    ],
)
def test_a_program_that_is_none_is_told_why(kind: type[Method], solver: str, error: type, told: str) -> None:
    recipe = load_recipe("ring", [f"method.solver={solver}"])
    method = kind(recipe)
    phases = method.phases(1.0)
    with pytest.raises(error, match=told):
        MethodTrace(method, phases, list(accumulate(plan_iterations(recipe, phases)))).iteration(0)
