"""The actor that writes checkpoints in the background and reads them back."""

import os
import time
from pathlib import Path

import numpy as np
import ray
from ray import ObjectRef

from raydmd.atomic import writing
from raydmd.runs.expert_index import write_index
from raydmd.runs.folders import expert_file
from raydmd.runtime.checkpoint.manager import Archive, Manifest, Shards, Writer, file_sha256
from raydmd.runtime.checkpoint.plan import RunPlan
from raydmd.runtime.checkpoint.shards import pieces
from raydmd.runtime.checkpoint.storage import Store
from raydmd.runtime.workers.helpers import Helper, tracked

NICE = 10  # trainers on the same cores come first


class CheckpointWriter(Helper):
    """Writes one thing at a time, on the node that has the run's folder. It may be restarted at any moment.

    Args:
        folder: the run's folder, on this node.
        uri: where manifests and shards go.
        keep: how many manifests to keep.
        writer: the run's driver; default: nobody in particular.
        plan: what manifests must agree with.

    Raises:
        UserError: ``checkpoint.path: ...``: the URI cannot be used.
    """

    def __init__(
        self, folder: str, uri: str, keep: int, writer: Writer | None = None, plan: RunPlan | None = None
    ) -> None:
        os.nice(NICE)  # before Arrow starts its threads, which inherit it
        self.folder = Path(folder)
        self.archive = Archive(uri, keep, writer, self.folder, plan)
        self.archive.store.progress = self.advance

    def ready(self) -> str:
        """Return where it writes, without what the URI says besides."""
        return str(self.archive.store)

    @tracked
    def save(self, manifest: Manifest, names: list[str], *states: dict[str, np.ndarray]) -> tuple[Manifest, float]:
        """Write one manifest with the trainers' states, which come as object references.

        Returns:
            The manifest with its files, and the seconds it took.

        Raises:
            RunError: the store cannot be written.
            StorageError: a disk is full or gone, or another driver has taken the archive over.
        """
        since = time.perf_counter()
        written = self.archive.save(manifest, dict(zip(names, states, strict=True)))
        return written, time.perf_counter() - since

    @tracked
    def save_expert(self, index: int, weights: dict[str, np.ndarray]) -> None:
        """Write a finished expert's weights into the archive and where the run keeps them.

        Raises:
            RunError: the store cannot be written.
            StorageError: a disk is full or gone, or another driver has taken the archive over.
        """
        self.archive.save_expert(index, weights)
        _keep(self.folder, index, weights)
        write_index(self.folder)

    @tracked
    def restore(self) -> tuple[Manifest | None, list[str], dict[str, ObjectRef]]:
        """Read the newest whole manifest; write finished experts that the run's folder lacks.

        Returns:
            The manifest, if any; a line for each broken one that was skipped; its shards by name in Ray's object
            store, owned by this actor: if it dies before they are used, ``restore`` again.

        Raises:
            UserError: the store cannot be reached.
            StorageError: the run's disk is full or gone.
        """
        found = self.archive.newest()
        if found.manifest is None:
            return None, found.skipped, {}
        keep_experts(self.folder, found.manifest, found.shards)
        return found.manifest, found.skipped, {name: ray.put(found.shards.pop(name)) for name in list(found.shards)}


def keep_experts(folder: Path, manifest: Manifest, shards: Shards) -> None:
    """Write a manifest's finished experts, as far as the run's folder lacks them or has others.

    Raises:
        StorageError: the run's disk is full or gone.
    """
    for index in spoilt_experts(folder, manifest):
        _keep(folder, index, shards[f"expert-{index}"])
    if manifest.experts:
        with writing(folder):
            write_index(folder)


def spoilt_experts(folder: Path, manifest: Manifest) -> list[int]:
    """Return the finished experts of a manifest that the run's folder lacks, or whose file differs in a bit."""
    records = [manifest.files[f"expert-{index}"] for index in range(manifest.experts)]
    return [
        index for index, record in enumerate(records) if file_sha256(expert_file(folder, index)) != record["sha256"]
    ]


def _keep(folder: Path, index: int, weights: dict[str, np.ndarray]) -> None:
    path = expert_file(folder, index)
    with writing(path):
        Store(str(folder)).write(str(path.relative_to(folder)), pieces(weights))
