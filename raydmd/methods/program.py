"""A method's iteration as a list of calls, made without doing any of them: what the executors and recovery go by."""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.methods.base import Frozen, Method
from raydmd.methods.loading import parse_recipe
from raydmd.methods.registry import build_method
from raydmd.models.buckets import draw_bucket, draws_of
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations

UPDATE = "update"  # the call that changes a trained role's weights


@dataclass(frozen=True, eq=False)
class PromptsNode:
    """The prompts of one draw."""

    iteration: int
    draw: int


@dataclass(frozen=True, eq=False)
class CallNode:
    """One call on a role.

    Attributes:
        role: whose.
        name: the part's method.
        at: updates of the role that come before it; for an update, its number.
        arguments: plain values.
        inputs: what other calls give, and prompts: one thing a micro-batch each.
        early: whether it may be made while the role has fewer updates.
    """

    role: str
    name: str
    at: int
    arguments: tuple[Any, ...]
    inputs: tuple["Node", ...]
    early: bool = False

    @property
    def commits(self) -> bool:
        """Whether it is an update."""
        return self.name == UPDATE


Node = PromptsNode | CallNode


@dataclass(eq=False)
class Trace:
    """The calls of one iteration in the order of the program.

    Attributes:
        calls: all of them.
        updates: of every trained role, once all are made.
    """

    calls: list[CallNode] = field(default_factory=list)
    updates: dict[str, int] = field(default_factory=dict)

    def needed(self, committed: Mapping[str, int]) -> list[CallNode]:
        """Return the updates that are not made, and the calls that these need, in order.

        Args:
            committed: updates made, by trained role.
        """
        wanted: set[Node] = set()
        for call in reversed(self.calls):
            if call in wanted or (call.commits and committed[call.role] <= call.at):
                wanted.add(call)
                wanted.update(call.inputs)
        return [call for call in self.calls if call in wanted]

    def draws(self) -> dict[str, list[int]]:
        """Return the draws that each trained role's updates are made on, in the order of the updates."""
        of: dict[Node, set[int]] = {}
        found: dict[str, list[int]] = {}
        for call in self.calls:
            of[call] = {draw for node in call.inputs for draw in ({node.draw} if isinstance(node, PromptsNode)
                                                                  else of[node])}  # fmt: skip
            if call.commits:
                found.setdefault(call.role, []).extend(sorted(of[call]))
        return found


class Tracer:
    """What a method's code is given so that its calls are written down (`raydmd.methods.base.Program`)."""

    def __init__(
        self, method: Method, phases: Sequence[Phase], ends: Sequence[int], updates: Mapping[str, int]
    ) -> None:
        self._method, self._phases, self._ends = method, phases, ends
        self._trace, self._early = Trace(updates=dict(updates)), False
        self._prompts: dict[tuple[int, int], PromptsNode] = {}

    def prompts(self, n: int, draw: int) -> PromptsNode:
        """Return the node of a draw."""
        return self._prompts.setdefault((n, draw), PromptsNode(n, draw))

    def phase(self, n: int) -> Phase:
        """Return the phase of an iteration."""
        return self._phases[bisect_right(self._ends, n)]

    def __getattr__(self, role: str) -> "RoleTracer":
        if role.startswith("_") or role not in self._method.roles:
            raise AttributeError(
                f"{self._method.name} has no role '{role}'; its roles: {', '.join(self._method.roles)}"
            )
        return RoleTracer(self, role)

    def add(self, role: str, name: str, values: tuple[Any, ...]) -> CallNode:
        """Write a call down."""
        inputs = tuple(value for value in values if isinstance(value, Node))
        arguments = tuple(value for value in values if not isinstance(value, Node))
        if values[: len(arguments)] != arguments:
            raise TypeError(f"{role}.{name}: plain arguments come before what other calls give")
        frozen = isinstance(self._method.roles[role], Frozen)
        if frozen and name == UPDATE:
            raise TypeError(f"{role}.{name}: the role is frozen")
        call = CallNode(role, name, self._trace.updates.get(role, 0), arguments, inputs, self._early)
        self._trace.calls.append(call)
        if name == UPDATE:
            self._trace.updates[role] += 1
        return call

    def iteration(self, n: int) -> Trace:
        """Trace a whole iteration."""
        self._early = True
        made = self._method.rollouts(self, n)
        if any(call.commits for call in self._trace.calls):
            raise TypeError(f"{self._method.name}: rollouts() makes no update")
        self._early = False
        self._method.iteration(self, n, made)
        return self._trace

    def preparation(self, n: int) -> Trace:
        """Trace what may be prepared for an iteration."""
        self._method.prepare(self, n)
        return self._trace


@dataclass(frozen=True)
class RoleTracer:
    """One role's calls, to be written down."""

    tracer: Tracer
    role: str

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.tracer.add(self.role, name, values)


class MethodTrace:
    """What a method does in each iteration of a run, told without doing it.

    Args:
        method: the method.
        phases: of the run.
        ends: the iteration at which each phase ends.
    """

    def __init__(self, method: Method, phases: Sequence[Phase], ends: Sequence[int]) -> None:
        self.method, self.phases, self.ends = method, phases, list(ends)
        self._before: list[dict[str, int]] = [dict.fromkeys(method.trained(), 0)]

    def updates_before(self, n: int) -> dict[str, int]:
        """Return how many updates each trained role has made before iteration ``n``."""
        while len(self._before) <= n:
            self._before.append(self._tracer(len(self._before) - 1).iteration(len(self._before) - 1).updates)
        return self._before[n]

    def updates_in(self, phase: int) -> dict[str, int]:
        """Return how many updates each trained role makes in a phase, by its index."""
        begin = self.updates_before(self.ends[phase - 1] if phase else 0)
        return {role: made - begin[role] for role, made in self.updates_before(self.ends[phase]).items()}

    def updates_up_to(self, phase: int, limits: Mapping[str, int]) -> dict[str, int]:
        """Return `updates_in`, counted no further once every role of ``limits`` has made more than is said there."""
        made = dict.fromkeys(self.method.trained(), 0)
        for n in range(self.ends[phase - 1] if phase else 0, self.ends[phase]):
            made = Tracer(self.method, self.phases, self.ends, made).iteration(n).updates
            if all(made[role] > limit for role, limit in limits.items()):
                break
        return made

    def iteration(self, n: int) -> Trace:
        """Return the calls of iteration ``n``."""
        return self._tracer(n).iteration(n)

    def buckets(self, n: int) -> dict[str, list[list[int]]]:
        """Return the sizes of the batches that each trained role's updates of iteration ``n`` are made on, in order.

        Empty where a run has no buckets.
        """
        recipe = self.method.recipe
        if not (buckets := recipe.prompts.buckets):
            return {}
        weights, first = [bucket.weight for bucket in buckets], n * draws_of(recipe)

        def size(draw: int) -> list[int]:
            return list(buckets[draw_bucket(recipe.seed, first + draw, weights)].size)

        return {role: [size(draw) for draw in draws] for role, draws in self.iteration(n).draws().items()}

    def preparation(self, n: int) -> Trace:
        """Return the calls that may be made ahead for iteration ``n``."""
        return self._tracer(n).preparation(n)

    def complete(self, updates: Mapping[str, int]) -> int:
        """Return the number of iterations whose updates are all made.

        Args:
            updates: made, by trained role.
        """
        n, total = 0, self.ends[-1]
        while n < total and all(self.updates_before(n + 1)[role] <= made for role, made in updates.items()):
            n += 1
        return n

    def consistent(self, updates: Mapping[str, int], max_staleness: int = 0) -> bool:
        """Whether a run can go on from trained roles that have made so many updates each.

        Each call that is still needed is made by weights that are there: those of its place in the program, older ones
        where rollouts may be stale, and newer ones only of a role that is done with the iteration and has trained on
        the next one's stale rollouts.
        """
        n = self.complete(updates)
        last = min(n + 1 + max_staleness, self.ends[-1])
        if any(made > self.updates_before(last)[role] for role, made in updates.items()):
            return False
        if n == self.ends[-1]:
            return True
        after = self.updates_before(n + 1)
        return all(
            updates[call.role] <= call.at or (not call.early and call.at == after[call.role])
            for call in self.iteration(n).needed(updates)
            if call.role in updates
        )

    def _tracer(self, n: int) -> Tracer:
        return Tracer(self.method, self.phases, self.ends, self.updates_before(n))


def trace_method(recipe: Recipe, t_max: float = 1.0) -> MethodTrace:
    """Return what a recipe's method does.

    Args:
        recipe: the recipe.
        t_max: the schedule's noisiest time.

    Raises:
        UserError: a method, phases or iterations that do not go together.
    """
    return _trace(recipe.model_dump_json(), t_max)


@lru_cache(maxsize=4)
def _trace(recipe: str, t_max: float) -> MethodTrace:
    """Trace a recipe, as JSON: a long run's iterations are counted once in a process."""
    parsed = parse_recipe(json.loads(recipe), "recipe")
    method = build_method(parsed)
    phases = method.phases(t_max)
    return MethodTrace(method, phases, list(accumulate(plan_iterations(parsed, phases))))


def plan_updates(part: Any, recipe: Recipe, role: str, phase: int, t_max: float = 1.0) -> None:
    """Tell the optimizer of a role that begins a phase how many updates it will make, if its learning rate falls.

    Args:
        part: the role's; its phase has begun.
        recipe: the run's recipe.
        role: its name.
        phase: index of the phase.
        t_max: the schedule's noisiest time.
    """
    if part.flat.settings.schedule != "constant":
        part.flat.total = trace_method(recipe, t_max).updates_in(phase)[role]


def check_warmups(recipe: Recipe, t_max: float = 1.0) -> None:
    """Refuse a learning rate that does not come to rise as far as ``lr`` in a phase.

    Raises:
        UserError: a role's warm-up takes all of its updates in a phase.
    """
    warmups = {role: recipe.optimizer.of(role).warmup for role in build_method(recipe).trained()}
    warmups = {role: updates for role, updates in warmups.items() if updates}
    for phase in range(len(trace_method(recipe, t_max).ends)) if warmups else ():
        made = trace_method(recipe, t_max).updates_up_to(phase, warmups)
        for role, warmup in warmups.items():
            if 0 < made[role] <= warmup:
                raise UserError(f"optimizer.{role}.warmup: {warmup} of the {made[role]} updates of phase {phase + 1} "
                                f"leave none at the whole lr; at most {made[role] - 1}")  # fmt: skip
