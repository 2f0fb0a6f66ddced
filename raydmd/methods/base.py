"""What a method is: the roles that it has, and one iteration of calls on them.

A method is plain code. `raydmd.methods.local` runs it in one process, where a call returns its results;
`raydmd.runtime.executor` runs it over a cluster, where a call returns a handle. Both give the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from raydmd.config.recipe import MethodOptions, Recipe
from raydmd.models.base import Family
from raydmd.sampling.phase import Phase
from raydmd.training.generator import Generator
from raydmd.training.teacher import Scorer


@dataclass(frozen=True)
class Trained:
    """A role whose weights are trained: replicas that share out every batch, and a state that manifests keep.

    Its part has ``start_phase(index, updates)``, ``updates``, ``flat`` (a `raydmd.training.trainable_state`),
    ``state()``, ``figures`` (names of what its updates report), ``update(*inputs, collective=)`` and whatever calls the
    method makes on it. ``update`` takes a list for each input, one entry a micro-batch of this replica's, and returns
    `raydmd.training.messages.UpdateStats`; it is the only call that changes the weights. Every other call is made for
    each micro-batch: ``part.NAME(*arguments, *inputs of that micro-batch)``.

    Attributes:
        part: built with (recipe, family, teacher, phases, device).
    """

    part: type[Any]


@dataclass(frozen=True)
class Frozen:
    """A role without a state: a pool of workers, each of which answers for whatever micro-batch it is given.

    Attributes:
        part: built with (recipe, family, teacher, phases, device).
    """

    part: type[Any]


class Calls(Protocol):
    """What can be called on one role: ``calls.NAME(*arguments, *inputs)``."""

    def __getattr__(self, name: str) -> Any: ...


class Program(Protocol):
    """What a method's code is given: its roles as attributes, prompts, and where in the run it is."""

    def prompts(self, n: int, draw: int) -> Any:
        """Return the prompts of a draw of iteration ``n``: its place in the method's ``draws``."""

    def phase(self, n: int) -> Phase:
        """Return the phase of iteration ``n``."""

    def __getattr__(self, role: str) -> Calls: ...


class Method(ABC):
    """A program over roles. What it does may depend on the iteration's number and on options, never on a tensor.

    Args:
        recipe: the run's recipe.

    Attributes:
        name: as ``method.name`` has it.
        options_type: its section of the recipe; the common options, and its own.
        roles: what it trains and what it asks, by name. Their workers are started in this order. A class names all; a
            method may leave out those that its options have no use for.
        student: the trained role that holds the experts; its part is a `Generator`.
        teacher: the frozen role that draws the teacher's pictures and its ODE pairs; its part is a `Scorer`.
    """

    name: ClassVar[str]
    roles: Mapping[str, Trained | Frozen]
    options_type: ClassVar[type[MethodOptions]] = MethodOptions
    student: ClassVar[str] = "generator"
    teacher: ClassVar[str] = "teacher"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.options = recipe, recipe.method

    @abstractmethod
    def phases(self, t_max: float) -> list[Phase]:
        """Return the phases in the order in which they are trained.

        Raises:
            UserError: options that do not go together.
        """

    def check(self, family: Family, hub: bool = True) -> list[str]:
        """Refuse, before a run starts, options that do not go with the family, and files that are not there.

        Args:
            family: the recipe's.
            hub: whether weights that are not on this machine are fetched.

        Returns:
            What only the hub can tell, a line each.

        Raises:
            UserError: one line that names the key and the value or file.
        """
        return []

    @property
    @abstractmethod
    def draws(self) -> tuple[str, ...]:
        """The stream of prompts that each draw of an iteration is taken from; a stream walks all rows by itself."""

    @property
    def pairs(self) -> int:
        """How many of the teacher's ODE pairs the student has before it is trained."""
        return 0

    def rollouts(self, run: Program, n: int) -> Any:
        """Make the calls of iteration ``n`` that may be made ``runtime.max_staleness`` iterations early.

        They are the trained roles' as these are when the calls are made. What is returned goes to ``iteration``.
        """
        return None

    @abstractmethod
    def iteration(self, run: Program, n: int, rollouts: Any) -> None:
        """Make the calls of iteration ``n``, and the updates; ends with the student's update."""

    def prepare(self, run: Program, n: int) -> None:
        """Make calls that help iteration ``n`` and depend on no weights in training; they may be left out."""
        return

    def trained(self) -> list[str]:
        """Return the names of the roles that have a state."""
        return [name for name, role in self.roles.items() if isinstance(role, Trained)]

    def frozen(self) -> list[str]:
        """Return the names of the roles that have none."""
        return [name for name, role in self.roles.items() if isinstance(role, Frozen)]


STUDENT, TEACHER = Trained(Generator), Frozen(Scorer)
