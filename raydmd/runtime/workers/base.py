"""The actors of the three roles: thin shells that run a role's part, refuse what is out of turn, and say what it cost.

Calls run one after another, in the order in which they were made. Two run beside them: ``heartbeat`` and ``drop``.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch

from raydmd.config.recipe import Recipe
from raydmd.data.trajectories import Pairs
from raydmd.errors import RunError, UserError
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.shards import LabelledTensors
from raydmd.runtime.workers.helpers import BESIDE
from raydmd.runtime.workers.process_group import ProcessGroup, StepDropped
from raydmd.runtime.workers.wire import from_wire, to_wire
from raydmd.sampling.noise import initial_noise
from raydmd.training.collective import Alone, Collective
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import Score
from raydmd.training.preview import preview
from raydmd.training.teacher import Scorer
from raydmd.training.trial import try_row


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch's place in the global batch."""

    index: int
    start: int
    count: int


@dataclass(frozen=True)
class CallStats:
    """What a call cost and reports: small, so that the controller may read it.

    Attributes:
        role: teacher, fake or generator.
        worker: the worker's number.
        busy_seconds: time inside the call, but for what it waited for its peers.
        figures: the part's own report, if any.
        versions: generator and fake version of every micro-batch that the call took in or gave out.
        micros: micro-batches that it worked on.
    """

    role: str
    worker: int
    busy_seconds: float
    figures: Any = None
    versions: tuple[tuple[int, int], ...] = ()
    micros: int = 0


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
    """Build a role's part (`Generator`, `Fake`, `Scorer`) with the recipe's family and teacher."""
    family = recipe_family(recipe)
    return part(recipe, family, family.load_teacher(), device)


PARTS: dict[str, Factory] = {
    "generator": partial(make_part, Generator),
    "fake": partial(make_part, Fake),
    "teacher": partial(make_part, Scorer),
}


class Worker:
    """What the roles' workers share: one part, one thread of calls."""

    role: str

    def __init__(self, recipe: Recipe, number: int, threads: int, device: str, factory: Factory) -> None:
        torch.set_num_threads(threads)
        random.seed(recipe.seed)
        self.number, self.recipe, self.device = number, recipe, device
        self._misfit: UserError | RunError | None = None
        try:
            self.part = factory(recipe, device)
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
            yield Turn(self)
        finally:
            self._turn = None


class Turn:
    """One call's time."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.since, self.waited = worker, time.perf_counter(), self._waited(worker)

    def stats(self, micros: int = 0, figures: Any = None, versions: list[tuple[int, int]] | None = None) -> CallStats:
        """Say what the call has cost so far."""
        busy = time.perf_counter() - self.since - (self._waited(self.worker) - self.waited)
        return CallStats(self.worker.role, self.worker.number, busy, figures, tuple(versions or ()), micros)

    @staticmethod
    def _waited(worker: Worker) -> float:
        return worker.collective.waited if isinstance(worker.collective, ProcessGroup) else 0.0


class TrainerWorker(Worker):
    """One replica of a trained role: a place in the group's generations, and a state that can be handed over.

    Every time the group is formed it has a new generation. A call is refused when its generation was dropped, or when
    the replica is not at the update that the call is made for: it can then be made again, and nothing is ever trained
    on twice.
    """

    part: Generator | Fake

    def __init__(self, recipe: Recipe, number: int, threads: int, device: str, factory: Factory) -> None:
        super().__init__(recipe, number, threads, device, factory)
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

    def start_phase(self, index: int, iteration: int) -> None:
        """Begin phase ``index`` at ``iteration``, unless that is done."""
        if self._phase != index:
            with self.turn("start_phase"):
                self.part.start_phase(index, iteration)
                self._phase = index

    def take_over(self, index: int, updates: int, state: Any) -> None:
        """Stand in phase ``index`` after ``updates`` steps, where ``state`` was given; None: at the phase's begin."""
        with self.turn("take_over"):
            self._phase = -1  # it stands nowhere until it has all of the state
            self.part.start_phase(index, 0)
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


class GeneratorWorker(TrainerWorker):
    """Rolls out and trains one replica of the generator."""

    role = "generator"
    part: Generator

    def take_over(self, index: int, updates: int, state: Any, pairs: Any = None, *experts: Any) -> None:
        """Take finished experts' weights and the regression's pairs, too."""
        for number, weights in enumerate(experts):
            self.part.experts.start(number)
            self.part.experts.load_state(number, from_wire(weights))
        if pairs is not None:
            self.part.pairs = Pairs.join([from_wire(pairs)], self.device)
        super().take_over(index, updates, state)

    def expert(self, index: int) -> Any:
        """Return a finished expert's weights by name, with its file's metadata."""
        experts = self.part.experts
        return LabelledTensors(to_wire(experts.state(index)), experts.metadata())

    def pairs(self) -> Any:
        """Return the regression's pairs, if there are any."""
        return None if self.part.pairs is None else to_wire(self.part.pairs)

    def load_pairs(self, *parts: Any) -> None:
        """Take the teacher's ODE pairs, in order."""
        self.part.pairs = Pairs.join([from_wire(part) for part in parts], self.device)

    def prepare(self, micros: list[MicroBatch], iteration: int, *conditions: Any) -> CallStats:
        """Make ahead the frozen experts' part of every rollout of an iteration; conditions go by draw, then micro."""
        with self.step("prepare", iteration, ahead=1) as turn:
            for number, condition in enumerate(conditions):
                update, micro = number // len(micros), micros[number % len(micros)]
                self.part.prepare(iteration, update, micro.start, micro.count, from_wire(condition))
            return turn.stats(len(micros))

    def rollout(self, micros: list[MicroBatch], iteration: int, update: int, *conditions: Any) -> list[Any]:
        """Return the samples of each micro-batch of a fake update, then the call's statistics."""
        made = []
        with self.step("rollout", iteration, ahead=self.recipe.runtime.max_staleness) as turn:
            for micro, condition in zip(micros, conditions, strict=True):
                made.append(self.part.rollout(iteration, update, micro.start, micro.count, from_wire(condition)))
            versions = [(samples.batch_id.generator_version, -1) for samples in made]
            return [*to_wire(made), turn.stats(len(micros), versions=versions)]

    def propose(self, micros: list[MicroBatch], iteration: int, *conditions: Any) -> list[Any]:
        """Return the generator's own noised samples, whose graph is kept here, then the call's statistics."""
        made = []
        with self.step("propose", iteration) as turn:
            for micro, condition in zip(micros, conditions, strict=True):
                made.append(self.part.propose(iteration, micro.start, micro.count, from_wire(condition)))
            versions = [(proposal.batch_id.generator_version, -1) for proposal in made]
            return [*to_wire(made), turn.stats(len(micros), versions=versions)]

    def update(self, micros: list[MicroBatch], iteration: int, *scores: Any) -> CallStats:
        """Apply the gradient that the teacher's and the fake's scores (in that order) give."""
        with self.step("update", iteration) as turn:
            received: list[Score] = [from_wire(score) for score in scores]
            figures = self.part.update(received[: len(micros)], received[len(micros) :], self.collective)
            versions = [(score.batch_id.generator_version, score.batch_id.fake_version) for score in received]
            return turn.stats(len(micros), figures, versions)

    def end_phase(self, index: int, iteration: int) -> None:
        """Fix expert ``index`` at its averaged weights, unless that is done."""
        if self._phase == index:
            with self.step("end_phase", iteration):
                self.part.end_phase()

    def preview(self, count: int, conditions: Any, at: int) -> Any:
        """Return pictures [count, C, H, W] of the averaged weights as they are, for equal seeds at every call."""
        with self.step("preview", at):
            return to_wire(preview(self.part, from_wire(conditions), count))


class FakeWorker(TrainerWorker):
    """Trains one replica of the fake score."""

    role = "fake"
    part: Fake

    def update(self, micros: list[MicroBatch], number: int, *samples: Any) -> CallStats:
        """Make the run's fake update ``number`` on this replica's micro-batches."""
        with self.step("update", number) as turn:
            batches = [from_wire(batch) for batch in samples]
            figures = self.part.update(batches, self.collective)
            versions = [(b.batch_id.generator_version, figures.version) for b in batches]
            return turn.stats(len(micros), figures, versions)

    def score(self, micros: list[MicroBatch], number: int, *proposals: Any) -> list[Any]:
        """Return the prediction on each proposal after ``number`` updates, then the call's statistics."""
        with self.step("score", number) as turn:
            scores = [self.part.score(from_wire(proposal)) for proposal in proposals]
            versions = [(score.batch_id.generator_version, score.batch_id.fake_version) for score in scores]
            return [*to_wire(scores), turn.stats(len(micros), versions=versions)]


class TeacherWorker(Worker):
    """Scores with the frozen teacher."""

    role = "teacher"
    part: Scorer

    def score(self, proposal: Any) -> tuple[Any, CallStats]:
        """Return the guided prediction on a proposal, and the call's statistics."""
        with self.turn("score") as turn:
            score = self.part.score(from_wire(proposal))
            return to_wire(score), turn.stats(1, versions=[(score.batch_id.generator_version, -1)])

    def preview(self, count: int, conditions: Any) -> tuple[Any, CallStats]:
        """Return the teacher's own many-step pictures [count, C, H, W] for the students' seeds, and statistics."""
        with self.turn("preview") as turn:
            noise = initial_noise(self.part.family, self.recipe.seed, 0, count)
            latents = self.part.sample(noise, from_wire(conditions), steps=self.recipe.teacher.steps)[-1]
            return to_wire(self.part.family.decode(latents)), turn.stats()

    def pairs(self, start: int, count: int, conditions: Any) -> tuple[Any, CallStats]:
        """Return ODE pairs, and the call's statistics."""
        with self.turn("pairs") as turn:
            return to_wire(self.part.pairs(start, count, from_wire(conditions))), turn.stats()


WORKERS: dict[str, type[Worker]] = {"generator": GeneratorWorker, "fake": FakeWorker, "teacher": TeacherWorker}
