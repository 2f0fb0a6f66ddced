"""The actors of roles: thin shells that run a role's part, refuse what is out of turn, and say what it cost.

Calls run one after another, in the order in which they were made. Two run beside them: ``heartbeat`` and ``drop``.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch

from raydmd.config.recipe import Recipe
from raydmd.data.trajectories import Pairs
from raydmd.errors import RunError, UserError
from raydmd.methods.base import Frozen, Method
from raydmd.methods.pairs import folder_pairs
from raydmd.methods.program import plan_updates
from raydmd.methods.registry import build_method, plan_phases
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.shards import LabelledTensors
from raydmd.runtime.workers.helpers import BESIDE
from raydmd.runtime.workers.process_group import ProcessGroup, StepDropped
from raydmd.runtime.workers.wire import from_wire, to_wire
from raydmd.training.collective import Alone, Collective
from raydmd.training.generator import Generator
from raydmd.training.messages import MicroBatch, PromptBatch, UpdateStats
from raydmd.training.preview import preview
from raydmd.training.trial import try_row


@dataclass(frozen=True)
class CallStats:
    """What a call cost and reports: small, so that the controller may read it.

    Attributes:
        role: its name.
        worker: the worker's number.
        busy_seconds: time inside the call, but for what it waited for its peers.
        figures: what an update reports.
        staleness: updates of its role that were missing when it was made.
        micros: micro-batches that it worked on.
        call: the part's method.
    """

    role: str
    worker: int
    busy_seconds: float
    figures: UpdateStats | None = None
    staleness: int = 0
    micros: int = 0
    call: str = ""


@dataclass(frozen=True)
class Identity:
    """Where a worker lives.

    Attributes:
        node: Ray's id of its node.
        pid: its process.
    """

    node: str
    pid: int


@dataclass(frozen=True)
class Heartbeat:
    """What a worker is at, said beside its work.

    Attributes:
        method: the call it is in, if any.
        seconds: how long it has been in it, or at work in it since it last waited for its group's peers.
        waiting: whether it waits for its group's peers.
    """

    method: str | None
    seconds: float
    waiting: bool


@dataclass(frozen=True, order=True)
class TrainerProgress:
    """How far a trainer has come; ordered by progress.

    Attributes:
        phase: index of the phase in training; -1 before the first.
        updates: optimizer steps made, over all phases.
    """

    phase: int
    updates: int


Factory = Callable[[Recipe, str], Any]  # (recipe, device) -> a role's part


def make_part(part: type, recipe: Recipe, device: str) -> Any:
    """Build a role's part (`Generator`, `Fake`, `Scorer` ...) with the recipe's family, teacher and phases."""
    family = recipe_family(recipe)
    return part(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max), device)


def role_part(role: str, recipe: Recipe, device: str) -> Any:
    """Build a role's part as the recipe's method has it."""
    return make_part(build_method(recipe).roles[role].part, recipe, device)


class Worker:
    """What the roles' workers share: one part, one thread of calls.

    Args:
        role: its name in the recipe's method.
        recipe: the run's recipe.
        number: unique among all workers of the role in this run.
        threads: torch threads.
        device: where it computes.
        factory: what builds the part; None: as the method has it.
    """

    def __init__(
        self, role: str, recipe: Recipe, number: int, threads: int, device: str, factory: Factory | None = None
    ) -> None:
        torch.set_num_threads(threads)
        random.seed(recipe.seed)
        self.role, self.number, self.recipe, self.device = role, number, recipe, device
        self._misfit: UserError | RunError | None = None
        try:
            self.part = role_part(role, recipe, device) if factory is None else factory(recipe, device)
        except (UserError, RunError) as error:  # an actor whose constructor fails loses the error's kind
            self._misfit = error
        self.collective: Collective = Alone()
        self._turn: tuple[str, float] | None = None

    def ready(self, row: Any = None) -> Identity:
        """Say where it is, once the worker is up and its network has taken a row of the prompts.

        Args:
            row: the conditions of one row, as numpy arrays; None: none is tried.

        Raises:
            UserError, RunError: the teacher cannot be used, or does not go with the prompts.
        """
        if self._misfit is not None:
            raise self._misfit
        if row is not None:
            try_row(self.part, self.role, from_wire(row))
        return Identity(ray.get_runtime_context().get_node_id(), os.getpid())

    @ray.method(concurrency_group=BESIDE)
    def heartbeat(self) -> Heartbeat:
        """Say what the worker is at."""
        turn, group = self._turn, self.collective
        waiting = isinstance(group, ProcessGroup) and group.waiting
        if turn is None:
            return Heartbeat(None, 0.0, waiting)
        since = max(turn[1], group.last_waited) if isinstance(group, ProcessGroup) else turn[1]
        return Heartbeat(turn[0], time.monotonic() - since, waiting)

    @contextmanager
    def turn(self, method: str) -> Iterator["Turn"]:
        """Run a call's body; what it yields makes the call's statistics."""
        self._turn = (method, time.monotonic())
        try:
            yield Turn(self, method)
        finally:
            self._turn = None


class Turn:
    """One call's time."""

    def __init__(self, worker: Worker, call: str) -> None:
        self.worker, self.call = worker, call
        self.since, self.waited = time.perf_counter(), self._waited(worker)

    def stats(self, micros: int = 0, figures: UpdateStats | None = None, staleness: int = 0) -> CallStats:
        """Say what the call has cost so far."""
        busy = time.perf_counter() - self.since - (self._waited(self.worker) - self.waited)
        return CallStats(self.worker.role, self.worker.number, busy, figures, staleness, micros, self.call)

    @staticmethod
    def _waited(worker: Worker) -> float:
        return worker.collective.waited if isinstance(worker.collective, ProcessGroup) else 0.0


class TrainerWorker(Worker):
    """One replica of a trained role: a place in the group's generations, and a state that can be handed over.

    Every time the group is formed it has a new generation. A call is refused when its generation was dropped, or when
    the replica is not at the update that the call is made for: it can then be made again, and nothing is ever trained
    on twice.
    """

    def __init__(
        self, role: str, recipe: Recipe, number: int, threads: int, device: str, factory: Factory | None = None
    ) -> None:
        super().__init__(role, recipe, number, threads, device, factory)
        self._generation, self._dropped, self._phase = 0, 0, -1

    def join(self, generation: int, address: tuple[str, int], rank: int, world: int) -> None:
        """Take a place in the group; blocks until its peers have come."""
        with self.turn("join"):
            self.collective = Alone()
            group = ProcessGroup(self.device == "cuda")
            if world > 1:
                self.collective = group
            self._generation = generation
            if generation <= self._dropped:  # after the collective is set: `drop` must find it, or this find the drop
                raise StepDropped(f"generation {generation} was dropped")
            if world > 1:
                group.join(address, f"{self.role}/{generation}", rank, world)

    @ray.method(concurrency_group=BESIDE)
    def drop(self, generation: int) -> None:
        """Give up the step under way and refuse all calls until the group is formed with a higher number."""
        self._dropped = max(self._dropped, generation)
        if isinstance(self.collective, ProcessGroup) and self._generation <= generation:
            self.collective.drop()

    @contextmanager
    def step(self, method: str, at: int, ahead: int = 0) -> Iterator[Turn]:
        """Run a training call that is made for update ``at``.

        Raises:
            StepDropped: the group is being formed anew, or the replica is not there.
        """
        if self._generation <= self._dropped:
            raise StepDropped("the group is being formed anew")
        if not 0 <= at - self.part.updates <= ahead:
            raise StepDropped(f"{self.role} {self.number} is at update {self.part.updates}, the call is for {at}")
        with self.turn(method) as turn:
            yield turn

    def progress(self) -> TrainerProgress:
        """Say how far this replica has come."""
        return TrainerProgress(self._phase, self.part.updates)

    def start_phase(self, index: int, updates: int) -> None:
        """Begin phase ``index`` after so many updates, unless that is done."""
        if self._phase != index:
            with self.turn("start_phase"):
                self._phase = -1  # it stands nowhere until all of the phase's part is made
                self._start_phase(index, updates)
                self._phase = index

    def _start_phase(self, index: int, updates: int) -> None:
        self.part.start_phase(index, updates)
        plan_updates(self.part, self.recipe, self.role, index)

    def produce(
        self, name: str, micros: list[MicroBatch], at: int, ahead: int, arguments: tuple[Any, ...], *inputs: Any
    ) -> list[Any]:
        """Call the part's ``name`` for each micro-batch; return the results, then the call's statistics."""
        with self.step(name, at, ahead) as turn:
            made = self._each(name, micros, arguments, inputs)
            return [*to_wire(made), turn.stats(len(micros), staleness=at - self.part.updates)]

    def prepare(
        self, name: str, micros: list[MicroBatch], at: int, arguments: tuple[Any, ...], *inputs: Any
    ) -> CallStats:
        """Call the part's ``name`` for each micro-batch; what it makes, it keeps."""
        with self.step(name, at) as turn:
            self._each(name, micros, arguments, inputs)
            return turn.stats(len(micros))

    def update(self, micros: list[MicroBatch], at: int, count: int, *inputs: Any) -> CallStats:
        """Make update ``at`` with the peers; the part takes ``count`` lists, each of one value a micro-batch."""
        with self.step("update", at) as turn:
            each = len(micros)
            lists = [
                [
                    _received(micro, value)
                    for micro, value in zip(micros, inputs[k * each : (k + 1) * each], strict=True)
                ]
                for k in range(count)
            ]
            return turn.stats(len(micros), self.part.update(*lists, collective=self.collective))

    def _each(
        self, name: str, micros: list[MicroBatch], arguments: tuple[Any, ...], inputs: tuple[Any, ...]
    ) -> list[Any]:
        call, given = getattr(self.part, name), _split(inputs, len(micros))
        return [
            call(*arguments, *(_received(micro, each[number]) for each in given)) for number, micro in enumerate(micros)
        ]

    def take_over(self, index: int, updates: int, state: Any) -> None:
        """Stand in phase ``index`` after ``updates`` steps, where ``state`` was given; None: at the phase's begin."""
        with self.turn("take_over"):
            self._phase = -1  # it stands nowhere until it has all of the state
            self._start_phase(index, 0)
            if state is not None:
                self.part.flat.load_state(from_wire(state))
            self._phase, self.part.updates = index, updates

    def state(self, at: int) -> Any:
        """Return all that the update after ``at`` depends on, as numpy arrays.

        Raises:
            StepDropped: the replica is not there.
        """
        if at != self.part.updates:
            raise StepDropped(f"{self.role} {self.number} is at update {self.part.updates}, not {at}")
        with self.turn("state"):
            return to_wire(self.part.state())


class StudentWorker(TrainerWorker):
    """One replica of the trained role that holds the experts."""

    part: Generator

    def take_over(self, index: int, updates: int, state: Any, pairs: Any = None, *experts: Any) -> None:
        """Take finished experts' weights and the teacher's ODE pairs, too; pairs of a folder it reads itself."""
        self._phase = -1
        for number, weights in enumerate(experts):
            self.part.experts.start(number)
            self.part.experts.load_state(number, from_wire(weights))
        if pairs is not None:
            self.part.pairs = Pairs.join([from_wire(pairs)], self.device)
        self.open_pairs()
        super().take_over(index, updates, state)

    def expert(self, index: int) -> Any:
        """Return a finished expert's weights by name, with its file's metadata."""
        experts = self.part.experts
        return LabelledTensors(to_wire(experts.state(index)), experts.metadata())

    def pairs(self) -> Any:
        """Return the teacher's ODE pairs, if there are any that are not in a folder."""
        return to_wire(self.part.pairs) if isinstance(self.part.pairs, Pairs) else None

    def load_pairs(self, *parts: Any) -> None:
        """Take the teacher's ODE pairs, in order."""
        self.part.pairs = Pairs.join([from_wire(part) for part in parts], self.device)

    def open_pairs(self) -> None:
        """Take the pairs of the recipe's ``pairs.path``, if it has one, as this worker's machine sees the folder.

        Raises:
            UserError: it is not there.
        """
        if (pairs := folder_pairs(self.recipe, self.device)) is not None:
            self.part.pairs = pairs

    def end_phase(self, index: int, updates: int) -> None:
        """Fix expert ``index`` at its averaged weights, unless that is done."""
        if self._phase == index:
            with self.step("end_phase", updates):
                self.part.end_phase()

    def preview(self, count: int, conditions: Any, at: int) -> Any:
        """Return pictures [count, C, H, W] of the averaged weights as they are, for equal seeds at every call."""
        with self.step("preview", at):
            return to_wire(preview(self.part, from_wire(conditions), count))


class FrozenWorker(Worker):
    """Answers for a frozen role."""

    def call(self, name: str, *inputs: Any) -> tuple[Any, CallStats]:
        """Call the part's ``name``; return its result, and the call's statistics.

        Args:
            name: the part's method.
            inputs: what it takes; where a `MicroBatch` is before them, they are of that micro-batch.
        """
        micro = inputs[0] if inputs and isinstance(inputs[0], MicroBatch) else None
        with self.turn(name) as turn:
            given = inputs if micro is None else inputs[1:]
            received = [from_wire(value) if micro is None else _received(micro, value) for value in given]
            return to_wire(getattr(self.part, name)(*received)), turn.stats(1)


def worker_type(method: Method, role: str) -> type[Worker]:
    """Return the class of a role's workers, which has the role's name, so that Ray shows whose an actor is."""
    kind: type[Worker] = FrozenWorker if isinstance(method.roles[role], Frozen) else TrainerWorker
    if role == method.student:
        kind = StudentWorker
    return type("".join(word.capitalize() for word in re.split("[-_]", role)) + "Worker", (kind,), {})


def _split(inputs: tuple[Any, ...], micros: int) -> list[tuple[Any, ...]]:
    """Cut what a call was sent into its inputs, each of one value a micro-batch."""
    return [inputs[at : at + micros] for at in range(0, len(inputs), micros)] if micros else []


def _received(micro: MicroBatch, value: Any) -> Any:
    """Return a role's message, or a micro-batch of prompts, which comes as its conditions."""
    received = from_wire(value)
    return PromptBatch(micro.start, micro.count, received) if isinstance(value, dict) else received
