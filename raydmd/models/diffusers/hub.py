"""Names of models on the Hugging Face hub, ``hf://owner/name@revision``, and their snapshots in the local cache."""

import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydmd.errors import UserError
from raydmd.models.base import one_line

HUB = "hf://"
COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_REVISION = "main"
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
ANSWER_S, LIMIT_S = 5.0, 8.0  # of the hub's answer; of all that goes before it, looking up its name included
IGNORED = ("*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*", "*.gguf")


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

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def parse_hub_name(path: str) -> HubName:
    """Read ``hf://owner/name`` or ``hf://owner/name@revision``.

    Raises:
        UserError: it is of another form.
    """
    name, at, revision = path.removeprefix(HUB).partition("@")
    if not re.fullmatch(f"{PART}/{PART}", name) or (at and not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*", revision)):
        raise UserError(f"teacher.path: '{path}' is not {HUB}owner/name or {HUB}owner/name@revision")
    return HubName(name, revision or None)


def hub_hint(path: str) -> str:
    """Return a hint for a path that is no folder but has the form of a hub's name."""
    return f"; on the hub it is {HUB}{path}" if re.fullmatch(f"{PART}/{PART}(?:@.+)?", path) else ""


def cached_snapshot(hub: HubName) -> Path | None:
    """Return the folder of a model's snapshot in the local cache, laid out as huggingface_hub does; else None.

    It may hold some of the model's files only. Its name is the commit.
    """
    folder, commit = _cache_folder(hub), hub.revision or DEFAULT_REVISION
    if not COMMIT.fullmatch(commit):
        reference = folder / "refs" / commit
        if not reference.is_file():
            return None
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def resolve_commit(hub: HubName) -> HubName:
    """Return the name with the commit that its revision is at: as the hub says, else as the cache remembers it.

    Raises:
        UserError: no such model or revision, none that this user may read, or, within `LIMIT_S` seconds, no hub and
            nothing in the cache.
    """
    if hub.is_commit:
        return hub
    commit, why = _ask(hub)
    if commit is None:
        snapshot = cached_snapshot(hub)
        if snapshot is None:
            raise UserError(f"teacher.path: '{hub}' is not in this machine's cache, and {why}")
        commit = snapshot.name
    else:
        _remember(hub, commit)
    return HubName(hub.name, commit)


def fetch(hub: HubName, patterns: Sequence[str]) -> Path:
    """Have the files that match some patterns in the cache; return the snapshot's folder.

    What is there already needs no network.

    Args:
        hub: a name with a commit (`resolve_commit`).
        patterns: as fnmatch takes them.

    Raises:
        UserError: the hub has no such model, or cannot be reached within `LIMIT_S` seconds while files are missing.
    """
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {
        "repo_id": hub.name, "revision": hub.revision, "allow_patterns": list(patterns),
        "ignore_patterns": list(IGNORED),
    }  # fmt: skip
    cached = cached_snapshot(hub)
    if cached is not None and (cached.parents[1] / "trees" / f"{hub.revision}.json").is_file():
        try:  # the list of the commit's files is there: what is missing can be told
            return Path(snapshot_download(**wanted, local_files_only=True))
        except OSError:
            cached = None
    commit, why = _ask(hub)
    if commit is None:
        if cached is not None:  # whether something is missing, its reader will see
            return cached
        raise UserError(f"teacher.path: '{hub}' is not, or not whole, in this machine's cache, and {why}")
    try:
        return Path(snapshot_download(**wanted))
    except Exception as error:  # of the network, of the disk, of the hub's permissions
        raise UserError(f"teacher.path: cannot fetch '{hub}': {one_line(error)}") from error


def _cache_folder(hub: HubName) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{hub.name.replace('/', '--')}"


def _remember(hub: HubName, commit: str) -> None:
    """Have the cache know at which commit a branch or tag is, as huggingface_hub does for what it fetches by that."""
    reference = _cache_folder(hub) / "refs" / (hub.revision or DEFAULT_REVISION)
    part = reference.with_name(f".{reference.name}.{os.getpid()}")
    with suppress(OSError):  # a cache that cannot be written is fetched into no more than it is written here
        reference.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(commit, encoding="utf-8")
        part.replace(reference)


def _ask(hub: HubName) -> tuple[str | None, str]:
    """Return the commit that the hub says a name is at; None and why, where the hub cannot be reached.

    The question is asked in a thread: looking up a host's name knows no time limit.

    Raises:
        UserError: the hub says that there is no such model or revision, or not for this user.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE forbids to ask the hub"
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(hub.name, revision=hub.revision, timeout=ANSWER_S).sha)
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    said = answer[0] if answer else TimeoutError("no answer")
    if isinstance(said, GatedRepoError):
        raise UserError(f"teacher.path: '{hub}' is gated: accept its terms on its page, and set HF_TOKEN")
    if isinstance(said, RevisionNotFoundError):
        raise UserError(f"teacher.path: hub model '{hub.name}' has no revision '{hub.revision}'")
    if isinstance(said, RepositoryNotFoundError):
        raise UserError(f"teacher.path: no model '{hub.name}' on the hub, or a private one that HF_TOKEN does not open")
    if isinstance(said, str):
        return said, ""
    return None, f"the hub at {constants.ENDPOINT} does not answer ({one_line(said) or type(said).__name__})"
