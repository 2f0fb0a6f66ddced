"""A teacher's folder as diffusers writes it: where its transformer lies, and which files make it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError
from raydmd.models.hub import HUB, cached_snapshot, parse_hub_name
from raydmd.models.protocol import no_folder

CONFIG = "config.json"
BESIDE = ("model_index.json", "scheduler/scheduler_config.json")  # of a pipeline's folder, what training depends on


@dataclass(frozen=True)
class TeacherFolder:
    """Where a teacher lies on this machine.

    Attributes:
        root: the folder of the pipeline, or of the transformer alone.
        subfolder: of the transformer in it; None: it is the root.
        revision: the hub's commit, where the folder is a snapshot of it.
    """

    root: Path
    subfolder: str | None
    revision: str | None = None

    @property
    def transformer(self) -> Path:
        """The transformer's folder."""
        return self.root / (self.subfolder or "")

    def files(self, weights: Sequence[str] | None = None) -> dict[str, Path]:
        """Return the files that the transformer and its schedule are made of, by a name that is the same anywhere.

        Args:
            weights: names of the weights' files; None: every safetensors file of the transformer's folder.
        """
        found = {CONFIG: self.transformer / CONFIG}
        names = weights if weights is not None else [file.name for file in self.transformer.glob("*.safetensors")]
        found |= {name: self.transformer / name for name in names}
        found |= {file.name: file for file in self.transformer.glob("*.safetensors.index*.json")}
        if self.subfolder is not None:
            found |= {f"../{name}": self.root / name for name in BESIDE if (self.root / name).is_file()}
        return found


def find_teacher(path: str, subfolder: str) -> TeacherFolder:
    """Return where a teacher lies on this machine: a folder, or the cached snapshot of ``hf://owner/name``.

    Raises:
        UserError: ``teacher.path: ...``: nothing there, or no transformer in it.
    """
    revision = None
    if path.startswith(HUB):
        root = cached_snapshot(parse_hub_name(path))
        if root is None:
            raise UserError(f"teacher.path: '{path}' is not in this machine's cache of the hub")
        revision = root.name
    else:
        root = Path(path)
        if not root.is_dir():
            raise no_folder(root)
    within = subfolder if (root / subfolder / CONFIG).is_file() else None
    if within is None and not (root / CONFIG).is_file():
        raise UserError(f"teacher.path: '{path}' has neither {subfolder}/{CONFIG} nor {CONFIG}")
    return TeacherFolder(root, within, revision)
