"""Manifests: one atomic record of a run's whole state, written after its shards and read back only if whole.

Below the root of an archive:

    step-000050.json                     the manifest: it names every shard with its checksum
    step-000050/generator.safetensors    trainers' states at that step
    experts/phase-1-0f3a....safetensors  finished experts, named by content, so that none is ever rewritten
    experts/phase-1.json                 which of them is the last that was finished
    recipe.yaml, teacher/                where the archive is not in the run's folder: that run's recipe, and the
                                         teacher that it trained itself
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy

from raydmd.errors import RunError, UserError
from raydmd.locations import KEY
from raydmd.runtime.shards import load_tensors, pieces
from raydmd.runtime.storage import Store, one_line

FORMAT = 3
BROKEN = (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError, RecursionError)
Shards = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Manifest:
    """What the run was when ``iteration`` iterations had been committed.

    Attributes:
        iteration: iterations committed; the next one has this number.
        phase: index of the phase that the next iteration belongs to; the number of phases when all is done.
        generator_version: generator updates made.
        fake_version: fake updates made.
        fake_cursor: position of the fake's rollouts in their stream of prompts, in samples: ``fake_version`` times
            the batch's size. With the seed it says which rows come next (`raydmd.data.row_order`).
        generator_cursor: the same of the generator's own batches: ``generator_version`` times the batch's size.
        seed: the recipe's seed.
        experts: finished experts.
        files: shard name ("generator", "fake", "expert-0", ...) to {"path", "sha256", "bytes"}.
        format: number of this record's layout.
        teacher: the teacher's fingerprint; "" where none was taken.
    """

    iteration: int
    phase: int
    generator_version: int
    fake_version: int
    fake_cursor: int
    generator_cursor: int
    seed: int
    experts: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    teacher: str = ""


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

    Raises:
        UserError: ``checkpoint.path: ...``: an unknown scheme, credentials inside the URI, a URI that cannot be read.
    """

    def __init__(self, uri: str, keep: int = 2) -> None:
        self.store = Store(uri)
        self.keep = keep
        self._experts: dict[str, dict[str, Any]] = {}  # only spares look-ups: another process finds them again

    def save(self, manifest: Manifest, shards: Shards) -> Manifest:
        """Write shards, then the manifest that names them, then drop what is older than ``keep``.

        Returns:
            The manifest with its files: the shards and every finished expert.

        Raises:
            RunError: the store cannot be written.
        """
        with self._reaching("written", RunError):
            steps, files = self._steps(), dict(manifest.files)
            for index in range(manifest.experts):
                files[f"expert-{index}"] = self._expert(index, [s for s in steps if s < manifest.iteration])
            # When a save is repeated, its first manifest is there: its shards stay until the second manifest is, too.
            again = f"-{secrets.token_hex(4)}" if manifest.iteration in steps else ""
            for name, tensors in shards.items():
                path = f"{_step(manifest.iteration)}/{name}{again}.safetensors"
                sha256, size = self.store.write(path, pieces(tensors))
                files[name] = {"path": path, "sha256": sha256, "bytes": size}
            whole = Manifest(**{**asdict(manifest), "files": files})
            self._write_json(f"{_step(manifest.iteration)}.json", asdict(whole))
            self._prune(whole)
            return whole

    def save_expert(self, index: int, tensors: dict[str, np.ndarray]) -> None:
        """Write a finished expert; every later manifest of more than ``index`` experts names it.

        Raises:
            RunError: the store cannot be written.
        """
        with self._reaching("written", RunError):
            digest, size = hashlib.sha256(), 0
            for piece in pieces(tensors):
                digest.update(piece)
                size += len(piece)
            path = f"experts/phase-{index + 1}-{digest.hexdigest()[:16]}.safetensors"
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
            UserError: the store cannot be reached, or not be read by this user.
        """
        skipped: list[str] = []
        with self._reaching("read", UserError):
            for step in reversed(self._steps()):
                try:
                    manifest = self._manifest(step)
                    shards = {name: self._shard(record) for name, record in manifest.files.items()}
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
            UserError: the store cannot be reached, or not be read by this user.
        """
        with self._reaching("read", UserError):
            for step in reversed(self._steps()):
                try:
                    manifest = self._manifest(step)
                except BROKEN as error:
                    if not self.store.lost(error):
                        raise
                    continue
                records = manifest.files.values()
                if self.store.sizes([record["path"] for record in records]) == [record["bytes"] for record in records]:
                    return manifest
        return None

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
        """
        with self._reaching("written", UserError):
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
            raise kind(f"{KEY}: {self.store} cannot be {what}: {one_line(error)}") from None

    def _steps(self) -> list[int]:
        """Return the steps that have a manifest, whole or not, the oldest first."""
        files, _ = self.store.listing()
        return sorted(int(found[1]) for name in files if (found := re.fullmatch(r"step-(\d{6,})\.json", name)))

    def _manifest(self, step: int) -> Manifest:
        manifest = _parse(self.store.read(f"{_step(step)}.json"))
        if manifest.iteration != step:
            raise ValueError(f"it is of iteration {manifest.iteration}")
        return manifest

    def _shard(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        return load_tensors(self.store.read(record["path"], record))

    def _expert(self, index: int, before: list[int]) -> dict[str, Any]:
        """Return a finished expert's record.

        The run's last manifest knows which expert the run is built on; ``experts/phase-K.json`` only at the end of
        the expert's phase, when no manifest names it yet: a run that went back may have left another one there.
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
                _check_record(name, record)
            except BROKEN as error:
                if not self.store.lost(error):
                    raise
                raise RunError(f"{KEY}: {self.store} holds no expert of phase {index + 1}: {one_line(error)}") from None
            self._experts[name] = record
        return self._experts[name]

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

        Only what an archive names so is dropped: the folder may be shared with other files.
        """
        steps = self._steps()
        kept = [step for step in steps if step <= newest.iteration][-self.keep :]
        for step in steps:
            if step not in kept:
                self.store.delete(f"{_step(step)}.json")
        named, (files, folders) = {_step(step) for step in kept}, self.store.listing()
        for name in files:  # left by a kill
            if (part := re.fullmatch(r"step-(\d{6,})\.json\.part", name)) and int(part[1]) <= newest.iteration:
                self.store.delete(name)
        for name in folders:
            if re.fullmatch(r"step-\d{6,}", name) and name not in named:
                self.store.delete(name, folder=True)
        if _step(newest.iteration) in folders:  # shards of a save that was repeated
            ours = {record["path"] for record in newest.files.values()}
            for name in self.store.listing(_step(newest.iteration))[0]:
                if f"{_step(newest.iteration)}/{name}" not in ours:
                    self.store.delete(f"{_step(newest.iteration)}/{name}")

    def _write_json(self, path: str, tree: dict[str, Any]) -> None:
        self.store.write(path, [json.dumps(tree, indent=1).encode()])


def _step(iteration: int) -> str:
    return f"step-{iteration:06d}"


def _parse(content: bytes) -> Manifest:
    """Read a manifest, believing nothing: what is not exactly one is a ValueError, TypeError or KeyError."""
    tree = json.loads(content)
    if not isinstance(tree, dict):
        raise ValueError("it is not a record")
    if tree.get("format") != FORMAT:
        raise ValueError(f"format {tree.get('format')}, {FORMAT} expected")
    manifest = Manifest(**tree)
    for each in fields(Manifest):
        value = getattr(manifest, each.name)
        if each.type is int and (type(value) is not int or value < 0):
            raise ValueError(f"{each.name} is {value!r}")
    if not isinstance(manifest.teacher, str):
        raise ValueError(f"teacher is {manifest.teacher!r}")
    if not isinstance(manifest.files, dict):
        raise ValueError("its files are not a record")
    for name, record in manifest.files.items():
        _check_record(name, record)
    for index in range(manifest.experts):
        if f"expert-{index}" not in manifest.files:
            raise ValueError(f"it names no expert-{index}")
    return manifest


def _check_record(name: str, record: Any) -> None:
    path = record["path"]
    if not (isinstance(path, str) and isinstance(record["sha256"], str) and type(record["bytes"]) is int):
        raise ValueError(f"{name}: not a record of a file")
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{name}: {path!r} leads out of the folder")
