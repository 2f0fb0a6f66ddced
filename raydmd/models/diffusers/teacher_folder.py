"""A teacher's folder as diffusers writes it: where its network lies, and which files make it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError
from raydmd.models.base import no_folder
from raydmd.models.diffusers.hub import HUB, HubName, fetch, hub_hint, parse_hub_name, resolve_commit
from raydmd.models.diffusers.weight_files import ENDING, STEM, read_json

CONFIG = "config.json"
SECOND = "transformer_2"
CONFIGS = ("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json", "*.index.json")
BESIDE = ("model_index.json", "scheduler/scheduler_config.json")  # of a pipeline's folder, what training depends on


@dataclass(frozen=True)
class TeacherFolder:
    """Where a teacher lies on this machine.

    Attributes:
        root: the folder of the pipeline, or of the network alone.
        subfolder: of the network in it; None: it is the root.
        hub: the name with its commit, where the folder is a snapshot of the hub's.
    """

    root: Path
    subfolder: str | None
    hub: HubName | None = None

    @property
    def network(self) -> Path:
        """The network's folder."""
        return self.root / (self.subfolder or "")

    def fetch_weights(self, variant: str) -> None:
        """Have the network's weights here, where they are the hub's.

        Raises:
            UserError: they cannot be fetched.
        """
        stem = f"{self.subfolder}/{STEM}" if self.subfolder else STEM
        middle = f".{variant}" if variant else ""
        self.fetch([f"{stem}{middle}{ENDING}", f"{stem}{middle}-*{ENDING}", f"{stem}{ENDING}.index{middle}.json"])

    def fetch(self, patterns: Sequence[str]) -> None:
        """Have files that match some patterns here, where they are the hub's.

        Raises:
            UserError: they cannot be fetched.
        """
        if self.hub is not None:
            fetch(self.hub, patterns)

    def files(self, weights: Sequence[str] | None = None) -> dict[str, Path]:
        """Return the files that the network and its schedule are made of, by a name that is the same anywhere.

        Args:
            weights: names of the weights' files; None: every safetensors file of the network's folder.
        """
        found = {CONFIG: self.network / CONFIG}
        names = weights if weights is not None else [file.name for file in self.network.glob("*.safetensors")]
        found |= {name: self.network / name for name in names}
        found |= {file.name: file for file in self.network.glob("*.safetensors.index*.json")}
        if self.subfolder is not None:
            found |= {f"../{name}": self.root / name for name in BESIDE if (self.root / name).is_file()}
        return found

    def check_pipeline(self, family: str, pipelines: Sequence[str], alone: bool) -> None:
        """Refuse a pipeline that the family would run otherwise than it is made, or use only a part of.

        Args:
            family: the family's name.
            pipelines: the classes that it takes, as model_index.json names them.
            alone: whether the user has chosen one of two transformers by its subfolder.

        Raises:
            UserError: ``teacher.path: ...``: a pipeline of another class, or one of two transformers.
        """
        if self.subfolder is None:
            return
        file = self.root / "model_index.json"
        index = read_json(file) if file.is_file() else {}
        kind = index.get("_class_name")
        if index and kind not in pipelines:
            raise UserError(f"teacher.path: {file} is of a {kind}; family '{family}' takes a {' or '.join(pipelines)}")
        second = index["transformer_2"] if "transformer_2" in index else [(self.root / SECOND).is_dir() or None]
        if isinstance(second, list) and second and second[-1] is not None and not alone:
            ratio = index.get("boundary_ratio")
            raise UserError(f"teacher.path: {self.root} has two transformers (boundary_ratio {ratio}: transformer "
                            f"above, {SECOND} below it), and a teacher of two would need both on every worker, which "
                            f"is not there yet; one of them alone is taken by teacher.options.subfolder: transformer "
                            f"or {SECOND}")  # fmt: skip


def find_teacher(path: str, subfolder: str) -> TeacherFolder:
    """Return where a teacher lies on this machine: a folder, or a snapshot of ``hf://owner/name``, fetched if need be.

    Of a snapshot the configs are there, and the weights after `TeacherFolder.fetch_weights`.

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
    return TeacherFolder(root, within, hub)
