"""A student that makes pictures: what a run and an export of one have in common."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.models.base import Denoiser, Family
from raydmd.models.experts import Experts, fuse_lora
from raydmd.sampling.phase import Phase


class Student(ABC):
    """Experts on the phases of a step grid.

    Attributes:
        kind: what its folder is.
        folder: where it lies.
        recipe: what it was made by; of an export, as much as sampling needs.
        family: of its networks; encodes prompts and decodes latents.
        phases: in order.
        reloads: whether newer weights may come into its folder.
        format: of an export; None: it is none.
    """

    kind: ClassVar[str]
    reloads: ClassVar[bool]
    folder: Path
    recipe: Recipe
    family: Family
    phases: list[Phase]
    format: str | None = None

    @property
    def name(self) -> str:
        """The folder's name, which reports and pictures show."""
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return f"{self.kind} '{self.folder}'"

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """The times, high and low, between which each expert is called."""
        return [phase.interval for phase in self.phases]

    @property
    def teacher_family(self) -> Family:
        """The family of `teacher`.

        Raises:
            UserError: the teacher is not at hand.
        """
        return self.family

    @abstractmethod
    def teacher(self) -> Denoiser:
        """Load the teacher, frozen.

        Raises:
            UserError: it is not at hand, or cannot be loaded.
        """

    @abstractmethod
    def trained_phases(self) -> list[Phase]:
        """Return the phases whose experts are there, in order.

        Raises:
            UserError: none is.
        """

    @abstractmethod
    def expert_state(self, index: int, finite: bool = True) -> dict[str, Tensor]:
        """Return expert ``index``'s weights by name, as `Experts.state` has them.

        Args:
            index: of its phase, from 0.
            finite: refuse values that are not finite.

        Raises:
            UserError: it cannot be read, or has values that are not finite (if ``finite``).
        """

    @abstractmethod
    def files(self, index: int) -> list[Path]:
        """Return the files of expert ``index``, the weights first."""

    @abstractmethod
    def revision(self) -> str:
        """Return a name of the experts' weights, the same for copies of the folder."""

    @abstractmethod
    def check(self) -> list[str]:
        """Refuse, in seconds, what cannot be sampled; return remarks that its user should read.

        Raises:
            UserError: a part that is missing, broken or does not fit.
        """

    @abstractmethod
    def check_content(self) -> None:
        """Refuse experts that are not those that were written, byte for byte, where that is known.

        Raises:
            UserError: a file is missing, cut short or another.
        """

    def check_finished(self) -> list[Phase]:
        """Return all phases.

        Raises:
            UserError: some are not trained.
        """
        phases = self.trained_phases()
        if len(phases) < len(self.phases):
            raise UserError(f"{self.title} has experts for {len(phases)} of {len(self.phases)} phases: "
                            f"train it to its end")  # fmt: skip
        return phases

    def experts(self, teacher: Denoiser, finite: bool = True) -> Experts:
        """Load every trained expert onto copies (or adapters) of ``teacher``; ``finite`` as in `expert_state`."""
        kind = self.recipe.method.experts
        experts = Experts(
            teacher, len(self.phases), kind.kind, kind.rank, kind.alpha, self.family.lora_targets, self.recipe.seed,
            self.intervals,
        )  # fmt: skip
        for phase in self.trained_phases():
            experts.start(phase.index)
            experts.load_state(phase.index, self.expert_state(phase.index, finite))
        return experts.requires_grad_(False)

    def experts_on(self, device: torch.device | str) -> Experts:
        """Load every expert, and what they share, onto a device."""
        return self.experts(self.teacher().to(device)).to(device)

    def expert_network(self, index: int) -> Denoiser:
        """Load expert ``index`` as a network of its own, frozen: a LoRA is fused into it.

        Raises:
            UserError: it, or the teacher, is missing or does not fit, or cannot be fused.
        """
        kind = self.recipe.method.experts
        network, state = self.teacher().for_interval(*self.intervals[index]), self.expert_state(index)
        if kind.kind == "lora":
            fuse_lora(network, state, kind.rank, kind.alpha)
        else:
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(f"{self.files(index)[0]} does not fit the teacher's network: {error}") from None
        return network.requires_grad_(False).eval()
