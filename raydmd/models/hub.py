"""Names of models on the Hugging Face hub, ``hf://owner/name@revision``, and their snapshots in the local cache."""

import re
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError

HUB = "hf://"
COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    Attributes:
        name: ``owner/name``.
        revision: a branch, a tag or a commit; None: ``main``.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{HUB}{self.name}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(path: str) -> HubName:
    """Read ``hf://owner/name`` or ``hf://owner/name@revision``.

    Raises:
        UserError: it is of another form.
    """
    name, at, revision = path.removeprefix(HUB).partition("@")
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
    if not re.fullmatch(f"{part}/{part}", name) or (at and not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*", revision)):
        raise UserError(f"teacher.path: '{path}' is not {HUB}owner/name or {HUB}owner/name@revision")
    return HubName(name, revision or None)


def cached_snapshot(hub: HubName) -> Path | None:
    """Return the folder of a model's snapshot in this machine's cache, laid out as huggingface_hub does; else None.

    It may hold some of the model's files only. Its name is the commit.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub.name.replace('/', '--')}"
    commit = hub.revision or DEFAULT_REVISION
    if not COMMIT.fullmatch(commit):
        reference = folder / "refs" / commit
        if not reference.is_file():
            return None
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None
