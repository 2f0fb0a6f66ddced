"""Manifests: one atomic record of a run's whole state, written after its shards and read back only if whole."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from pyarrow import fs

from raydmd.folders import expert_file

FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What the run was when ``iteration`` iterations had been committed.

    Attributes:
        iteration: iterations committed; the next one has this number.
        phase: index of the phase that the next iteration belongs to; the number of phases when all is done.
        generator_version: generator updates made.
        fake_version: fake updates made.
        cursor: prompts consumed: the next sample of the run.
        seed: the recipe's seed.
        experts: finished experts.
        files: shard name to {"path", "sha256", "bytes"}.
        format: number of this record's layout.
    """

    iteration: int
    phase: int
    generator_version: int
    fake_version: int
    cursor: int
    seed: int
    experts: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


class Archive:
    """Checkpoints in a folder of any file system that pyarrow.fs knows (a path, s3://, gs://).

    Args:
        uri: the folder.
        keep: how many manifests to keep.
    """

    def __init__(self, uri: str, keep: int = 2) -> None:
        if "://" in uri:
            self.files, self.root = fs.FileSystem.from_uri(uri)
        else:
            self.files, self.root = fs.LocalFileSystem(), uri
        self.keep = keep

    def save(self, manifest: Manifest, shards: dict[str, dict[str, np.ndarray]]) -> Manifest:
        """Write shards, then the manifest that names them, then drop what is older than ``keep``."""
        files = dict(manifest.files)
        for name, tensors in shards.items():
            content = safetensors.numpy.save({key: np.asarray(value, order="C") for key, value in tensors.items()})
            path = f"step-{manifest.iteration:06d}/{name}.safetensors"
            self._write(path, content)
            files[name] = {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        whole = Manifest(**{**asdict(manifest), "files": files})
        record = f"step-{manifest.iteration:06d}.json"
        self._write(record, json.dumps(asdict(whole), indent=1).encode())
        self._prune(record)
        return whole

    def newest(self) -> tuple[Manifest, dict[str, dict[str, np.ndarray]]] | None:
        """Return the newest whole manifest and its shards; a broken one is skipped with a warning."""
        for path in reversed(self._manifests()):
            try:
                manifest = Manifest(**json.loads(self._read(path)))
                if manifest.format != FORMAT:
                    raise ValueError(f"format {manifest.format}, expected {FORMAT}")
                return manifest, {name: self._shard(record) for name, record in manifest.files.items()}
            except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
                log.warning("checkpoint %s/%s is not whole and is skipped: %s", self.root, path, error)
        return None

    def _shard(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        content = self._read(record["path"])
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise ValueError(f"{record['path']}: checksum differs")
        return safetensors.numpy.load(content)

    def _manifests(self) -> list[str]:
        entries = self.files.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(entry.base_name for entry in entries if entry.base_name.endswith(".json"))

    def _prune(self, newest: str) -> None:
        """Drop all but the last ``keep`` up to ``newest``; one after it was broken when the run went on from before."""
        manifests = self._manifests()
        keep = [path for path in manifests if path <= newest][-self.keep :]
        kept = {path.removesuffix(".json") for path in keep}
        for path in manifests:
            if path not in keep:
                self.files.delete_file(f"{self.root}/{path}")
        for entry in self.files.get_file_info(fs.FileSelector(self.root)):
            if entry.type == fs.FileType.Directory and entry.base_name not in kept:
                self.files.delete_dir(entry.path)

    def _write(self, path: str, content: bytes) -> None:
        """Write a file so that its name never shows half of it: object stores do so, elsewhere by a rename."""
        target = f"{self.root}/{path}"
        if not isinstance(self.files, fs.LocalFileSystem):
            with self.files.open_output_stream(target) as stream:
                stream.write(content)
            return
        self.files.create_dir(target.rpartition("/")[0])
        with self.files.open_output_stream(f"{target}.part") as stream:
            stream.write(content)
        self.files.move(f"{target}.part", target)

    def _read(self, path: str) -> bytes:
        with self.files.open_input_file(f"{self.root}/{path}") as stream:
            return pa.py_buffer(stream.read()).to_pybytes()


class Archivist:
    """An actor that writes checkpoints in the background, one at a time, on the node that has the run's folder."""

    def __init__(self, folder: str, keep: int) -> None:
        self.folder = Path(folder)
        self.archive = Archive(f"{folder}/checkpoints", keep)

    def save(self, manifest: Manifest, names: list[str], *states: dict[str, np.ndarray]) -> Manifest:
        """Write one manifest with the trainers' states, which come as object references."""
        return self.archive.save(manifest, dict(zip(names, states, strict=True)))

    def save_expert(self, index: int, weights: dict[str, np.ndarray]) -> None:
        """Write a finished expert's weights where the run keeps them."""
        path = expert_file(self.folder, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(safetensors.numpy.save({key: np.asarray(value, order="C") for key, value in weights.items()}))
        part.replace(path)
