"""Manifests: one atomic record of a run's whole state, written after its shards and read back only if whole.

Below the root of an archive:

    step-000050.json                     the manifest: it names every shard with its checksum
    step-000050/generator.safetensors    trainers' states at that step
    experts/phase-1-0f3a....safetensors  finished experts, named by content, so that none is ever rewritten
    experts/phase-1.json                 which of them is the last that was finished
    recipe.yaml, teacher/                where the archive is not in the run's folder: that run's recipe, and the
                                         teacher that it trained itself
    run.lock                             the driver that writes here

A manifest is checksummed as a whole: ``sha256`` is that of all its other values as JSON with sorted keys and no spaces.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy

from raydmd.errors import RunError, StorageError, UserError
from raydmd.locations import KEY
from raydmd.runs.folders import expert_file
from raydmd.runtime.checkpoint.lock import read_owner
from raydmd.runtime.checkpoint.manifest import (
    FORMAT,
    UPGRADED,
    Manifest,
    check_record,
    parse_manifest,
    read_sealed,
    sealed,
)
from raydmd.runtime.checkpoint.plan import RunPlan
from raydmd.runtime.checkpoint.shards import PIECE, load_tensors, pieces
from raydmd.runtime.checkpoint.storage import Store, one_line

BROKEN = (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError, RecursionError)
Shards = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Writer:
    """A driver, as an archive knows it.

    Attributes:
        owner: its token, which the lock says while it is at work.
        predecessors: the drivers whose manifests it found when it took the lock; it may delete theirs and its own.
    """

    owner: str
    predecessors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """What an archive holds.

    Attributes:
        manifest: the newest whole one, if any.
        shards: its shards by name, finished experts among them.
        skipped: a line for each broken manifest that is newer.
    """

    manifest: Manifest | None
    shards: Shards
    skipped: list[str]


class Archive:
    """Checkpoints in a folder of any file system that pyarrow.fs knows.

    Args:
        uri: the folder: a path, file://, s3:// or gs://.
        keep: how many manifests to keep.
        writer: who writes; default: somebody new, who takes what `newest` finds for a predecessor's. Nothing is written
            while another holds the archive's lock, and nothing deleted that another wrote.
        folder: the run's folder, whose copies of finished experts make good those that the archive lost.
        plan: what the manifests must agree with; a manifest that does not is broken.

    Raises:
        UserError: ``checkpoint.path: ...``: an unknown scheme, credentials inside the URI, a URI that cannot be read.
    """

    def __init__(
        self,
        uri: str,
        keep: int = 2,
        writer: Writer | None = None,
        folder: Path | None = None,
        plan: RunPlan | None = None,
    ) -> None:
        self.store = Store(uri)
        self.keep, self.folder, self.plan = keep, folder, plan
        self.owner = writer.owner if writer else secrets.token_hex(8)
        self._ours = {self.owner, *(writer.predecessors if writer else ())}
        self._experts: dict[str, dict[str, Any]] = {}  # only spares look-ups: another process finds them again

    def save(self, manifest: Manifest, shards: Shards) -> Manifest:
        """Write shards, then the manifest that names them, then drop what is older than ``keep``.

        Where it fails nothing that it wrote is left on a disk; in an object store the next save drops it.

        Returns:
            The manifest with its files: the shards and every finished expert.

        Raises:
            RunError: the store cannot be written, or lost what was written.
            StorageError: its disk is full or gone, or another driver has taken it over.
        """
        with self._reaching("written", RunError):
            self._check_owner()
            steps, files = self._steps(), dict(manifest.files)
            for index in range(manifest.experts):
                files[f"expert-{index}"] = self._expert(index, [s for s in steps if s < manifest.iteration])
            # When a save is repeated, its first manifest is there: its shards stay until the second manifest is, too.
            again = f"-{secrets.token_hex(4)}" if manifest.iteration in steps else ""
            written: list[str] = []
            try:
                for name, tensors in shards.items():
                    path = f"{_step(manifest.iteration)}/{name}{again}.safetensors"
                    sha256, size = self.store.write(path, pieces(tensors))
                    written.append(path)
                    files[name] = {"path": path, "sha256": sha256, "bytes": size}
                whole = Manifest(**{**asdict(manifest), "files": files, "writer": self.owner})
                if lost := self._missing(whole):
                    raise RunError(f"{KEY}: {self.store} lost {lost[0]} while a checkpoint was written")
                self._check_owner()
                self._write_json(f"{_step(manifest.iteration)}.json", sealed(asdict(whole)))
            except BaseException:
                self._take_back(written)
                raise
            self._prune(whole)
            return whole

    def save_expert(self, index: int, tensors: dict[str, np.ndarray]) -> None:
        """Write a finished expert; every later manifest of more than ``index`` experts names it.

        Raises:
            RunError: the store cannot be written.
            StorageError: its disk is full or gone, or another driver has taken it over.
        """
        with self._reaching("written", RunError):
            self._check_owner()
            digest, size = hashlib.sha256(), 0
            for piece in pieces(tensors):
                digest.update(piece)
                size += len(piece)
            path = _expert_path(index, digest.hexdigest())
            record = {"path": path, "sha256": digest.hexdigest(), "bytes": size}
            if not self._is_whole(record):
                self.store.write(path, pieces(tensors))
            self._write_json(f"experts/phase-{index + 1}.json", record)
            for name in self.store.listing("experts")[0]:  # left by a kill
                if name.startswith(f"phase-{index + 1}-") and name.endswith(".part"):
                    self.store.delete(f"experts/{name}")
            self._experts[f"expert-{index}"] = record

    def newest(self) -> Found:
        """Return the newest whole manifest and its shards, every byte of them checked; broken ones are skipped.

        Raises:
            UserError: the store cannot be reached, or not be read by this user; a manifest is of another version.
        """
        skipped: list[str] = []
        with self._reaching("read", UserError):
            for step in reversed(self._steps()):
                try:
                    manifest = self._manifest(step)
                    self._ours.add(manifest.writer)
                    shards = {name: self._shard(name, record) for name, record in manifest.files.items()}
                except BROKEN as error:
                    if not self.store.lost(error):
                        raise
                    why = one_line(error)
                    skipped.append(f"checkpoint {self.store}/{_step(step)}.json is not whole and is skipped: {why}")
                    continue
                self._experts = {name: record for name, record in manifest.files.items() if name.startswith("expert-")}
                return Found(manifest, shards, skipped)
        return Found(None, {}, skipped)

    def peek(self) -> Manifest | None:
        """Return the newest manifest that can be read and whose shards have the right size; they are not read.

        Raises:
            UserError: the store cannot be reached, or not be read by this user; a manifest is of another version.
        """
        with self._reaching("read", UserError):
            for step in reversed(self._steps()):
                try:
                    manifest = self._manifest(step)
                except BROKEN as error:
                    if not self.store.lost(error):
                        raise
                    continue
                if all(self._spare(name, manifest.files[name]) for name in self._missing(manifest)):
                    return manifest
        return None

    def writers(self) -> frozenset[str]:
        """Return who wrote the manifests that are there.

        Raises:
            UserError: the store cannot be reached, or not be read by this user.
        """
        with self._reaching("read", UserError):
            return frozenset(writer for step in self._steps() if (writer := self._writer_of(step)) is not None)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file at the root, whole or not at all.

        Raises:
            UserError: the store cannot be written.
        """
        self.write_bytes(name, text.encode())

    def read_text(self, name: str) -> str | None:
        """Return a small file at the root; None if there is none.

        Raises:
            UserError: the store cannot be reached, or not be read by this user.
        """
        content = self.read_bytes(name)
        return None if content is None else content.decode()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file below the root; one that was cut short may be there in part.

        Raises:
            UserError: the store cannot be written.
            StorageError: its disk is full or gone, or another driver has taken it over.
        """
        with self._reaching("written", UserError):
            self._check_owner()
            self.store.write(name, [content])

    def read_bytes(self, name: str) -> bytes | None:
        """Return a file below the root; None if there is none.

        Raises:
            UserError: the store cannot be reached, or not be read by this user.
        """
        with self._reaching("read", UserError):
            try:
                return self.store.read(name)
            except FileNotFoundError:
                return None

    @contextmanager
    def _reaching(self, what: str, kind: type[UserError] | type[RunError]) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            if what == "written" and (known := self.store.failure(error)) is not None:
                raise known from None
            raise kind(f"{KEY}: {self.store} cannot be {what}: {one_line(error)}") from None

    def _steps(self) -> list[int]:
        """Return the steps that have a manifest, whole or not, the oldest first."""
        files, _ = self.store.listing()
        return sorted(int(found[1]) for name in files if (found := re.fullmatch(r"step-(\d{6,})\.json", name)))

    def _manifest(self, step: int) -> Manifest:
        tree = read_sealed(self.store.read(f"{_step(step)}.json"))
        if tree.get("format") not in (UPGRADED, FORMAT):
            other = "an older" if tree.get("format", 0) < FORMAT else "a newer"
            told = f"{self.store}/{_step(step)}.json is of {other} version (format {tree.get('format')}, {FORMAT} here)"
            raise UserError(f"{KEY}: {told}; go on with that version of raydmd, or choose another place")
        manifest = parse_manifest(tree)
        if manifest.iteration != step:
            raise ValueError(f"it is of iteration {manifest.iteration}")
        if self.plan is not None:
            self.plan.check(manifest)
        return manifest

    def _shard(self, name: str, record: dict[str, Any]) -> dict[str, np.ndarray]:
        try:
            return load_tensors(self.store.read(record["path"], record))
        except BROKEN as error:
            if not self.store.lost(error) or not self._restore(name, record):
                raise
        return load_tensors(self.store.read(record["path"], record))

    def _missing(self, manifest: Manifest) -> list[str]:
        """Return the names of a manifest's shards that are not there in the right size."""
        records = manifest.files
        sizes = self.store.sizes([record["path"] for record in records.values()])
        return [name for (name, record), size in zip(records.items(), sizes, strict=True) if size != record["bytes"]]

    def _spare(self, name: str, record: dict[str, Any]) -> Path | None:
        """Return the run's own copy of a finished expert, if it is what a record says."""
        kind, _, index = name.rpartition("-")
        if self.folder is None or kind != "expert":
            return None
        path = expert_file(self.folder, int(index))
        return path if file_sha256(path) == record["sha256"] else None

    def _restore(self, name: str, record: dict[str, Any]) -> bool:
        """Write a finished expert that the archive lost from the run's own copy; return whether there is one."""
        if (spare := self._spare(name, record)) is None:
            return False
        with spare.open("rb") as stream:
            self.store.write(record["path"], iter(lambda: stream.read(PIECE), b""))
        return True

    def _check_owner(self) -> None:
        """See that no other driver holds the lock.

        Raises:
            StorageError: one does.
        """
        held = read_owner(self.store)
        if held is not None and held.owner != self.owner:
            raise StorageError(f"{KEY}: {self.store} is another driver's now (process {held.pid} on {held.host})")

    def _take_back(self, paths: list[str]) -> None:
        """Delete what a save that failed has written, where the disk says for sure that it failed."""
        if self.store.local:
            with suppress(OSError):
                for path in paths:
                    self.store.delete(path)
                for folder in {path.rpartition("/")[0] for path in paths}:
                    Path(self.store.root, folder).rmdir()  # an error where it is not empty

    def _writer_of(self, step: int) -> str | None:
        """Return who wrote a manifest; None where it cannot be told, as it is broken."""
        try:
            writer = read_sealed(self.store.read(f"{_step(step)}.json")).get("writer", "")
        except BROKEN as error:
            if not self.store.lost(error):
                raise
            return None
        return writer if isinstance(writer, str) else None

    def _expert(self, index: int, before: list[int]) -> dict[str, Any]:
        """Return a finished expert's record.

        The run's last manifest knows which expert the run is built on; ``experts/phase-K.json`` only at the end of
        the expert's phase, when no manifest names it yet: a run that went back may have left another one there. Where
        the archive lost the file, or all of it, the run's own copy makes it good.
        """
        name = f"expert-{index}"
        for step in reversed(before if name not in self._experts else []):
            try:
                self._experts[name] = self._manifest(step).files[name]
                break
            except BROKEN as error:
                if not self.store.lost(error):
                    raise
        if name not in self._experts:
            try:
                record = json.loads(self.store.read(f"experts/phase-{index + 1}.json"))
                check_record(name, record)
            except BROKEN as error:
                if not self.store.lost(error):
                    raise
                if (kept := self._own_record(index)) is None:
                    why = one_line(error)
                    raise RunError(f"{KEY}: {self.store} holds no expert of phase {index + 1}: {why}") from None
                record = kept
            self._experts[name] = record
        record = self._experts[name]
        if self.store.sizes([record["path"]]) != [record["bytes"]] and not self._restore(name, record):
            raise RunError(f"{KEY}: {self.store} lost the expert of phase {index + 1}, and the run's folder lacks it")
        return record

    def _own_record(self, index: int) -> dict[str, Any] | None:
        """Return what an expert's record is by the run's own copy of it."""
        path = None if self.folder is None else expert_file(self.folder, index)
        if path is None or (digest := file_sha256(path)) is None:
            return None
        return {"path": _expert_path(index, digest), "sha256": digest, "bytes": path.stat().st_size}

    def _is_whole(self, record: dict[str, Any]) -> bool:
        try:
            self.store.read(record["path"], record)
        except (OSError, ValueError) as error:
            if not self.store.lost(error):
                raise
            return False
        return True

    def _prune(self, newest: Manifest) -> None:
        """Drop all but the last ``keep`` up to ``newest``; one after it was broken when the run went on from before.

        Only what an archive names so is dropped: the folder may be shared with other files. And only what this driver
        or its predecessors wrote: another driver may be at work here in spite of the lock.
        """
        self._check_owner()
        steps = self._steps()
        ours = [step for step in steps if (writer := self._writer_of(step)) is None or writer in self._ours]
        kept = [step for step in ours if step <= newest.iteration][-self.keep :]
        gone = [step for step in ours if step not in kept]
        for step in gone:
            self.store.delete(f"{_step(step)}.json")
        files, folders = self.store.listing()
        for name in files:  # left by a kill
            if (part := re.fullmatch(r"step-(\d{6,})\.json\.part", name)) and int(part[1]) <= newest.iteration:
                self.store.delete(name)
        for name in folders:
            step = int(name[5:]) if re.fullmatch(r"step-\d{6,}", name) else -1
            if step in gone or (step not in steps and 0 <= step <= newest.iteration):  # the latter left by a kill
                self.store.delete(name, folder=True)
        if _step(newest.iteration) in folders:  # shards of a save that was repeated
            ours_here = {record["path"] for record in newest.files.values()}
            for name in self.store.listing(_step(newest.iteration))[0]:
                if f"{_step(newest.iteration)}/{name}" not in ours_here:
                    self.store.delete(f"{_step(newest.iteration)}/{name}")

    def _write_json(self, path: str, tree: dict[str, Any]) -> None:
        self.store.write(path, [json.dumps(tree, indent=1).encode()])


def _step(iteration: int) -> str:
    return f"step-{iteration:06d}"


def _expert_path(index: int, digest: str) -> str:
    return f"experts/phase-{index + 1}-{digest[:16]}.safetensors"


def file_sha256(path: Path) -> str | None:
    """Return a file's checksum in hexadecimal digits; None where there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
