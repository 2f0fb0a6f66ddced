"""An export as a student, for `raydmd generate` and `raydmd serve`; and what a folder is, by what is in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from raydmd.config.recipe import MethodOptions, Prompts, Recipe
from raydmd.errors import UserError
from raydmd.export.adapter_reading import Layers, read_state
from raydmd.export.description import check_scheduler, read_description
from raydmd.models.adapter_files import Adapter
from raydmd.models.base import Denoiser, Family
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.hub import HUB
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.encoding import encodes_first_frames
from raydmd.models.experts import Experts, adapted_layers
from raydmd.models.fingerprint import fingerprint_teacher, same_teacher
from raydmd.models.registry import build_family
from raydmd.runs.folders import EXPORT, RECIPE, is_export, is_run, other_than
from raydmd.runs.run import Run
from raydmd.runs.student import Student
from raydmd.sampling.phase import Phase

TEACHER = "teacher.path: "  # what a family's errors begin with


class Export(Student):
    """An export of a run, of any format that `raydmd export` writes.

    Args:
        folder: the export's.
        base: the folder, or ``hf://owner/name``, of the model that adapters are for; None: where export.json says.
        compared: whether the teacher is wanted, too: of an export of whole networks, ``base`` is.

    Raises:
        UserError: it is no export, of another version, or its parts do not go together; a base model that is not
            needed.
    """

    kind = "export"
    reloads = False

    def __init__(self, folder: str | Path, base: str | None = None, compared: bool = False) -> None:
        self.folder = Path(folder)
        if not is_export(self.folder):
            raise UserError(f"no export in '{folder}': {other_than(self.folder, [EXPORT])}")
        said = self.said = read_description(self.folder)
        self.format, self.given_base = said.format, base
        check_scheduler(said, self.folder)
        said.check_files(self.folder, content=False)
        if base is not None and not said.needs_base and not (said.own_networks and compared):
            raise UserError(f"--base {base}: {self.title} has all networks itself")
        path = self._base_path() if said.needs_base else str(self.folder)
        with _blamed(self._base if said.needs_base else self.title):
            self.family: Family = self._build(path)
        self.recipe = Recipe(
            name=said.run, teacher=said.teacher.model_copy(update={"path": path}),
            method=MethodOptions(name=said.method, experts=said.adapter), prompts=Prompts(buckets=said.buckets),
        )  # fmt: skip
        t_max = self.family.schedule.t_max
        self.phases = [
            Phase(index, expert.times, expert.times[-1], t_max, t_max, "sgts")
            for index, expert in enumerate(said.experts)
        ]
        if abs(self.phases[0].times[0] - t_max) > 1e-6 * t_max:
            raise UserError(f"{self.folder / EXPORT}: the experts' times begin at {self.phases[0].times[0]:g}, and the "
                            f"process of family '{said.teacher.family}' at {t_max:g}")  # fmt: skip

    @property
    def teacher_family(self) -> Family:
        """The base model's family.

        Raises:
            UserError: the export has the experts' networks alone, and no base model is named.
        """
        if not self.said.own_networks:
            return self.family
        if self.given_base is None:
            raise UserError(f"--teacher: {self.title} has the experts' networks alone; name the base model "
                            f"'{self.said.base}' by --base")  # fmt: skip
        with _blamed(self._base):
            return self._build(self.given_base)

    def teacher(self) -> Denoiser:
        """Load the base model, frozen.

        Raises:
            UserError: it is not at hand, or cannot be loaded.
        """
        with _blamed(self._base):
            return self.teacher_family.load_teacher()

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """Times of each expert between which its network, where the base model has two, is the one that scores them.

        They end with the last that the first network visits, and with that which the second one reaches: a step from
        their boundary may be either's.
        """
        second = self._pretrained.second_network
        return [(expert.times[0], expert.times[-1 if expert.network == second else -2]) for expert in self.said.experts]

    def trained_phases(self) -> list[Phase]:
        """Return all phases."""
        return self.phases

    def expert_state(self, index: int, finite: bool = True) -> dict[str, Tensor]:
        """Return an adapter's weights by the names that `Experts.state` has.

        Raises:
            UserError: it cannot be read, has another rank or alpha than is said, or values that are not finite.
        """
        expert, adapter = self.said.experts[index], self.said.adapter
        place = self.folder / expert.place
        state = read_state(
            self.said.format, place, Adapter(adapter.rank, adapter.alpha), lambda: self._layers(index)
        )  # fmt: skip
        if self._pretrained.second_network is not None:  # the files have the first network's name for both
            component = self._network(index).component
            state = {f"{component}.{name.partition('.')[2]}": value for name, value in state.items()}
        for name, value in state.items():
            if finite and not bool(torch.isfinite(value).all()):
                raise UserError(f"{place}: '{name}' has values that are not finite")
        return state

    def files(self, index: int) -> list[Path]:
        """Return the files of expert ``index``, the weights first."""
        return [self.folder / name for name in self.said.files_of(self.said.experts[index])]

    def revision(self) -> str:
        """Return a name of the experts' weights: of export.json, which has their hashes."""
        return blake2b((self.folder / EXPORT).read_bytes(), digest_size=6).hexdigest()

    def check(self) -> list[str]:
        """Refuse, by configs and headers, what cannot be sampled; return remarks that its user should read.

        Raises:
            UserError: networks that are not whole or do not fit, no text encoder, or another base model than the one
                that the export was made on, unless it is named by ``base``.
        """
        if self.said.own_networks:
            family = self._pretrained
            for expert in self.said.experts:
                with _blamed(self.title):
                    family.check_part(expert.place)
        else:
            with _blamed(self._base):
                self.family.check_teacher()
            for phase in self.phases:
                self.expert_state(phase.index)
        if self.family.condition_columns and not (self.family.reads_text or encodes_first_frames(self.family)):
            where = "--base names a folder that has one" if self.said.needs_base else "it has no text_encoder folder"
            raise UserError(f"{self.title}: there is no text encoder for its prompts ({where}); the run takes rows of "
                            f"its table instead")  # fmt: skip
        return self._check_base()

    def check_content(self) -> None:
        """Refuse experts that are not those that were exported, byte for byte.

        Raises:
            UserError: a file is missing, cut short or another.
        """
        self.said.check_files(self.folder, content=True)

    def experts_on(self, device: torch.device | str) -> Experts:
        """Load every expert, and what they share, onto a device."""
        if not self.said.own_networks:
            return super().experts_on(device)
        networks = [self.expert_network(phase.index).to(device) for phase in self.phases]
        return Experts.of_networks(networks).requires_grad_(False)

    def expert_network(self, index: int) -> Denoiser:
        """Load expert ``index`` as a network of its own, frozen.

        Raises:
            UserError: it cannot be loaded, or does not fit the base model.
        """
        if not self.said.own_networks:
            return super().expert_network(index)
        with _blamed(self.title):
            return self._pretrained.load_part(self.said.experts[index].place)

    @property
    def _pretrained(self) -> PretrainedFamily:
        assert isinstance(self.family, PretrainedFamily)  # `_build` has seen to it
        return self.family

    def _build(self, path: str) -> PretrainedFamily:
        teacher = self.said.teacher
        family = build_family(teacher.family, path, dict(teacher.options))
        if not isinstance(family, PretrainedFamily):
            raise UserError(f"{self.folder / EXPORT}: family '{teacher.family}' is not one of diffusers' models")
        return family

    def _base_path(self) -> str:
        """Return where the base model is.

        Raises:
            UserError: nobody says, or the folder is not there.
        """
        path = self.given_base or self.said.teacher.path
        if path is not None and (path.startswith(HUB) or self.given_base is not None or Path(path).is_dir()):
            return path
        where = "" if path is None else f", which was in {path}"
        raise UserError(f"{self.title} is of adapters for '{self.said.base}'{where}: name its folder, or "
                        f"hf://owner/name, by --base")  # fmt: skip

    def _check_base(self) -> list[str]:
        """Hold the base model against the one that the export was made on; return remarks."""
        wanted = self.said.fingerprint
        if wanted is None or not (self.said.needs_base or self.given_base):
            return []
        with _blamed(self._base):
            if same_teacher(wanted, fingerprint_teacher(self.teacher_family)):
                return []
        words = f"{self.title}: {self.given_base or self.said.teacher.path} has other weights than '{self.said.base}'"
        if self.given_base is None:
            raise UserError(
                f"{words} had when it was exported; name the right one, or this one all the same, by --base"
            )
        return [f"{words} had when it was exported: the pictures are not the run's"]

    @property
    def _base(self) -> str:
        """What the base model is called in messages."""
        return self.title if self.given_base is None else f"--base {self.given_base}"

    @cached_property
    def _outline(self) -> Denoiser:
        with _blamed(self._base):
            return self.family.outline()

    def _network(self, index: int) -> PretrainedDenoiser:
        """Return the outline of the base model's network that an expert's adapters are for."""
        network = self._outline.for_interval(*self.intervals[index])
        assert isinstance(network, PretrainedDenoiser)
        return network

    def _layers(self, index: int) -> Layers:
        """Return the names of the layers that may have an adapter of an expert, by those that the format has."""
        layers = {}
        for name in adapted_layers(self._network(index), self.family.lora_targets):
            _, _, layer = name.partition(".")
            layers[self._pretrained.original_layer(layer) if self.said.format == "lightning" else layer] = name
        return layers


def open_student(folder: str | Path, base: str | None = None, compared: bool = False) -> Student:
    """Open a run's folder or an export's, whichever it is.

    Args:
        folder: the folder.
        base: of an export, where its base model is.
        compared: whether the teacher is wanted, too.

    Raises:
        UserError: it is neither, or what `Run` and `Export` refuse.
    """
    place = Path(folder)
    if is_run(place):
        if base is not None:
            raise UserError(f"--base {base}: '{folder}' is a run, whose recipe names its teacher; it is for an export")
        return Run(place)
    if is_export(place):
        return Export(place, base, compared)
    raise UserError(f"no run in '{folder}', and no export: {other_than(place, [RECIPE, EXPORT])}")


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    """Have errors of a family, which are about a recipe's ``teacher.path``, begin with ``where``."""
    try:
        yield
    except UserError as error:
        words = str(error)
        raise UserError(f"{where}: {words.removeprefix(TEACHER)}" if words.startswith(TEACHER) else words) from None
