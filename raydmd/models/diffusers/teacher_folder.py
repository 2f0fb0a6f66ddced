"""A teacher's folder as diffusers writes it: where its networks lie, and which files make it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydmd.errors import UserError
from raydmd.models.base import no_folder
from raydmd.models.diffusers.hub import HUB, HubName, fetch, hub_hint, parse_hub_name, resolve_commit
from raydmd.models.diffusers.weight_files import ENDING, STEM, read_json, weight_files

CONFIG = "config.json"
INDEX = "model_index.json"
SECOND = "transformer_2"
ALONE = f"one of them alone is taken by teacher.options.subfolder: transformer or {SECOND}"
CONFIGS = (INDEX, "config.json", "*/config.json", "*/scheduler_config.json", "*.index.json")
BESIDE = (INDEX, "scheduler/scheduler_config.json")  # of a pipeline's folder, what training depends on


@dataclass(frozen=True)
class TeacherFolder:
    """Where a teacher lies on this machine.

    Attributes:
        root: the folder of the pipeline, or of the network alone.
        subfolder: of the network in it; None: it is the root.
        hub: the name with its commit, where the folder is a snapshot of the hub's.
        both: whether the pipeline's second network belongs to the teacher.
    """

    root: Path
    subfolder: str | None
    hub: HubName | None = None
    both: bool = False

    @property
    def network(self) -> Path:
        """The network's folder; of two, the first's."""
        return self.root / (self.subfolder or "")

    @property
    def networks(self) -> tuple[Path, ...]:
        """The folder of each network."""
        return (self.network, self.root / SECOND) if self.both else (self.network,)

    def fetch_weights(self, variant: str) -> None:
        """Have the networks' weights here, where they are the hub's.

        Raises:
            UserError: they cannot be fetched.
        """
        middle, patterns = f".{variant}" if variant else "", list[str]()
        for network in self.networks:
            stem = (network.relative_to(self.root) / STEM).as_posix()
            patterns += [f"{stem}{middle}{ENDING}", f"{stem}{middle}-*{ENDING}", f"{stem}{ENDING}.index{middle}.json"]
        self.fetch(patterns)

    def fetch(self, patterns: Sequence[str]) -> None:
        """Have files that match some patterns here, where they are the hub's.

        Raises:
            UserError: they cannot be fetched.
        """
        if self.hub is not None:
            fetch(self.hub, patterns)

    def files(self, variant: str) -> dict[str, Path]:
        """Return the files that the networks and their schedule are made of, by a name that is the same anywhere.

        Args:
            variant: of the weights' files; empty: of none.

        Raises:
            UserError: there are no such weights.
        """
        found = dict[str, Path]()
        for network in self.networks:
            before = "" if network == self.network else f"../{network.name}/"
            names = [CONFIG, *weight_files(network, variant)]
            names += [file.name for file in network.glob("*.safetensors.index*.json")]
            found |= {f"{before}{name}": network / name for name in names}
        if self.subfolder is not None:
            found |= {f"../{name}": self.root / name for name in BESIDE if (self.root / name).is_file()}
        return found

    def check_pipeline(self, family: str, pipelines: Sequence[str]) -> None:
        """Refuse a pipeline that the family would run otherwise than it is made.

        Args:
            family: the family's name.
            pipelines: the classes that it takes, as model_index.json names them.

        Raises:
            UserError: ``teacher.path: ...``: a pipeline of another class.
        """
        index = read_index(self.root) if self.subfolder is not None else {}
        kind = index.get("_class_name")
        if index and kind not in pipelines:
            raise UserError(f"teacher.path: {self.root / INDEX} is of a {kind}; family '{family}' takes a "
                            f"{' or '.join(pipelines)}")  # fmt: skip

    def boundary(self) -> float:
        """Return the time at which a pipeline of two networks changes from the first to the second.

        Raises:
            UserError: ``teacher.path: ...``: model_index.json does not say it, or there is no second network.
        """
        ratio = read_index(self.root).get("boundary_ratio")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio < 1.0:
            raise UserError(f"teacher.path: {self.root} has two transformers, but its {INDEX} has boundary_ratio "
                            f"{ratio!r}, not a number between 0 and 1 where {SECOND} takes over; {ALONE}")  # fmt: skip
        if not (self.root / SECOND / CONFIG).is_file():
            raise UserError(f"teacher.path: {self.root} has two transformers by its {INDEX}, but no {SECOND}/{CONFIG}; "
                            f"{ALONE}")  # fmt: skip
        return float(ratio)


def read_index(root: Path) -> dict[str, Any]:
    """Return a pipeline's model_index.json; empty where there is none.

    Raises:
        UserError: it cannot be read.
    """
    file = root / INDEX
    return read_json(file) if file.is_file() else {}


def has_second(root: Path) -> bool:
    """Whether a pipeline's folder has a second network, by its model_index.json, or without one by its folders.

    Raises:
        UserError: model_index.json cannot be read.
    """
    index = read_index(root)
    second = index[SECOND] if SECOND in index else [(root / SECOND).is_dir() or None]
    return isinstance(second, list) and bool(second) and second[-1] is not None


def find_teacher(path: str, subfolder: str, alone: bool = False) -> TeacherFolder:
    """Return where a teacher lies on this machine: a folder, or a snapshot of ``hf://owner/name``, fetched if need be.

    Of a snapshot the configs are there, and the weights after `TeacherFolder.fetch_weights`.

    Args:
        path: as the recipe has it.
        subfolder: of the network in a pipeline's folder.
        alone: take this network alone, though the pipeline has a second one.

    Raises:
        UserError: ``teacher.path: ...``: nothing there, no network in it, or no hub.
    """
    hub = None
    if path.startswith(HUB):
        hub = resolve_commit(parse_hub_name(path))
        root = fetch(hub, CONFIGS)
    else:
        root = Path(path)
        if not root.is_dir():
            if root.is_file():
                raise UserError(f"teacher.path: '{path}' is a file; the folder of a pipeline or of its network is "
                                f"needed")  # fmt: skip
            raise UserError(f"{no_folder(root)}{hub_hint(path)}")
    within = subfolder if (root / subfolder / CONFIG).is_file() else None
    if within is None and not (root / CONFIG).is_file():
        raise UserError(f"teacher.path: '{path}' has neither {subfolder}/{CONFIG} nor {CONFIG}")
    return TeacherFolder(root, within, hub, both=within is not None and not alone and has_second(root))
