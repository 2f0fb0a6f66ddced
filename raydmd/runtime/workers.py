"""The actors of the three roles: thin shells that run a role's part and say what it cost."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch

from raydmd.config import Recipe
from raydmd.methods.batch import Score
from raydmd.methods.collective import Alone, Collective
from raydmd.methods.fake import Fake
from raydmd.methods.generator import Generator
from raydmd.methods.pairs import Pairs
from raydmd.methods.sampling import initial_noise, preview
from raydmd.methods.scorer import Scorer
from raydmd.runs import recipe_family
from raydmd.runtime.process_group import ProcessGroup, listen
from raydmd.runtime.wire import from_wire, to_wire


@dataclass(frozen=True)
class Micro:
    """A micro-batch's place in the global batch."""

    index: int
    start: int
    count: int


@dataclass(frozen=True)
class Receipt:
    """What a call cost and reports: small, so that the controller may read it.

    Attributes:
        role: teacher, fake or generator.
        worker: the worker's number.
        busy_seconds: time inside the call.
        figures: the part's own report, if any.
        versions: generator and fake version of every micro-batch that the call took in or gave out.
    """

    role: str
    worker: int
    busy_seconds: float
    figures: Any = None
    versions: tuple[tuple[int, int], ...] = ()


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
    """What the roles' workers share: one part, one thread of calls, a place in the group."""

    role: str

    def __init__(self, recipe: Recipe, number: int, threads: int, device: str, factory: Factory) -> None:
        torch.set_num_threads(threads)
        random.seed(recipe.seed)
        self.number, self.recipe, self.device = number, recipe, device
        self.part = factory(recipe, device)
        self.collective: Collective = Alone()
        self._listener: Any = None

    def ready(self) -> str:
        """Return the device, once the worker is up."""
        return self.device

    def open_store(self) -> tuple[str, int]:
        """Begin to listen for the group's peers; return the address."""
        self._listener = listen(ray.util.get_node_ip_address())
        host, port = self._listener.getsockname()
        return host, port

    def join(self, address: tuple[str, int], rank: int, world: int) -> None:
        """Take a place in the trainer group."""
        if isinstance(self.collective, ProcessGroup):
            self.collective.close()
        listener = self._listener if rank == 0 else None
        self.collective = ProcessGroup(address, listener, rank, world, self.device == "cuda")

    def state(self) -> Any:
        """Return all that the next update depends on, as numpy arrays."""
        return to_wire(self.part.flat.state())

    def load_state(self, state: Any) -> None:
        """Take over what ``state`` returned."""
        self.part.flat.load_state(from_wire(state))

    def receipt(self, since: float, figures: Any = None, versions: list[tuple[int, int]] | None = None) -> Receipt:
        """Say what a call that began at ``since`` (time.perf_counter) cost."""
        return Receipt(self.role, self.number, time.perf_counter() - since, figures, tuple(versions or ()))


class GeneratorWorker(Worker):
    """Rolls out and trains one replica of the generator."""

    role = "generator"
    part: Generator

    def start_phase(self, index: int, iteration: int) -> None:
        """Begin to train expert ``index``."""
        self.part.start_phase(index, iteration)

    def load_expert(self, index: int, weights: Any) -> None:
        """Take a finished expert's weights."""
        self.part.experts.start(index)
        self.part.experts.load_state(index, from_wire(weights))

    def load_pairs(self, *parts: Any) -> None:
        """Take the teacher's ODE pairs, in order."""
        self.part.pairs = Pairs.join([from_wire(part) for part in parts], self.device)

    def prepare(self, micros: list[Micro], iteration: int, *conditions: Any) -> Receipt:
        """Make ahead the frozen experts' part of every rollout of an iteration; conditions go by draw, then micro."""
        since = time.perf_counter()
        for number, condition in enumerate(conditions):
            update, micro = number // len(micros), micros[number % len(micros)]
            self.part.prepare(iteration, update, micro.start, micro.count, from_wire(condition))
        return self.receipt(since)

    def rollout(self, micros: list[Micro], iteration: int, update: int, *conditions: Any) -> list[Any]:
        """Return the samples of each micro-batch of a fake update, then a receipt."""
        since, made = time.perf_counter(), []
        for micro, condition in zip(micros, conditions, strict=True):
            made.append(self.part.rollout(iteration, update, micro.start, micro.count, from_wire(condition)))
        versions = [(samples.stamp.generator_version, -1) for samples in made]
        return [*to_wire(made), self.receipt(since, versions=versions)]

    def propose(self, micros: list[Micro], iteration: int, *conditions: Any) -> list[Any]:
        """Return the generator's own noised samples, whose graph is kept here, then a receipt."""
        since, made = time.perf_counter(), []
        for micro, condition in zip(micros, conditions, strict=True):
            made.append(self.part.propose(iteration, micro.start, micro.count, from_wire(condition)))
        versions = [(proposal.stamp.generator_version, -1) for proposal in made]
        return [*to_wire(made), self.receipt(since, versions=versions)]

    def update(self, micros: list[Micro], *scores: Any) -> Receipt:
        """Apply the gradient that the teacher's and the fake's scores (in that order) give."""
        since = time.perf_counter()
        received: list[Score] = [from_wire(score) for score in scores]
        figures = self.part.update(received[: len(micros)], received[len(micros) :], self.collective)
        versions = [(score.stamp.generator_version, score.stamp.fake_version) for score in received]
        return self.receipt(since, figures, versions)

    def end_phase(self) -> Any:
        """Fix the expert at its averaged weights and return them."""
        return to_wire(self.part.end_phase())

    def preview(self, count: int, conditions: Any) -> Any:
        """Return pictures [count, C, H, W] of the averaged weights as they are, for equal seeds at every call."""
        return to_wire(preview(self.part, from_wire(conditions), count))


class FakeWorker(Worker):
    """Trains one replica of the fake score."""

    role = "fake"
    part: Fake

    def start_phase(self, index: int, iteration: int) -> None:
        """Re-make the fake score from the teacher."""
        self.part.start_phase(index, iteration)

    def update(self, micros: list[Micro], *samples: Any) -> Receipt:
        """Train on this replica's micro-batches."""
        since = time.perf_counter()
        batches = [from_wire(batch) for batch in samples]
        figures = self.part.update(batches, self.collective)
        return self.receipt(since, figures, [(b.stamp.generator_version, figures.version) for b in batches])

    def score(self, micros: list[Micro], *proposals: Any) -> list[Any]:
        """Return the prediction on each proposal, then a receipt."""
        since = time.perf_counter()
        scores = [self.part.score(from_wire(proposal)) for proposal in proposals]
        versions = [(score.stamp.generator_version, score.stamp.fake_version) for score in scores]
        return [*to_wire(scores), self.receipt(since, versions=versions)]


class TeacherWorker(Worker):
    """Scores with the frozen teacher."""

    role = "teacher"
    part: Scorer

    def score(self, proposal: Any) -> tuple[Any, Receipt]:
        """Return the guided prediction on a proposal, and a receipt."""
        since = time.perf_counter()
        score = self.part.score(from_wire(proposal))
        return to_wire(score), self.receipt(since, versions=[(score.stamp.generator_version, -1)])

    def preview(self, count: int, conditions: Any) -> tuple[Any, Receipt]:
        """Return the teacher's own many-step pictures [count, C, H, W] for the students' seeds, and a receipt."""
        since = time.perf_counter()
        noise = initial_noise(self.part.family, self.recipe.seed, 0, count)
        latents = self.part.sample(noise, from_wire(conditions), steps=self.recipe.teacher.steps)[-1]
        return to_wire(self.part.family.decode(latents)), self.receipt(since)

    def pairs(self, start: int, count: int, conditions: Any) -> tuple[Any, Receipt]:
        """Return ODE pairs, and a receipt."""
        since = time.perf_counter()
        return to_wire(self.part.pairs(start, count, from_wire(conditions))), self.receipt(since)


WORKERS: dict[str, type[Worker]] = {"generator": GeneratorWorker, "fake": FakeWorker, "teacher": TeacherWorker}
