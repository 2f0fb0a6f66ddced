"""File systems in which the process dies by SIGKILL at a chosen operation, and what the tests of checkpoints save."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

from raydmd.runtime.checkpoint.manager import Archive, Found, Manifest
from raydmd.runtime.checkpoint.storage import Store


def manifest(iteration: int, **changes: Any) -> Manifest:
    updates = {"generator": iteration, "fake": 5 * iteration}
    cursors = {"generator": 16 * iteration, "fake": 80 * iteration}
    values = {"phase": 0, "updates": updates, "cursors": cursors, "seed": 3, "experts": 0, **changes}
    return Manifest(iteration=iteration, **values)


def shards(iteration: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(iteration)
    return {
        role: {"weight": rng.standard_normal(3000).astype(np.float32), "version": np.array(iteration)}
        for role in ("generator", "fake")
    }


def expert(kind: int) -> dict[str, np.ndarray]:
    return {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T + kind, "b": np.zeros((0, 2), np.float16)}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and np.array_equal(found[name], value) for name, value in expected.items()
    )


def is_of(found: Found, iteration: int, experts: tuple[int, ...] = (), edge: bool = False) -> bool:
    """Whether what ``newest`` returned is all of one iteration's state, to the bit."""
    assert found.manifest is not None, found.skipped
    expected = {} if edge else shards(iteration)
    expected |= {f"expert-{index}": expert(kind) for index, kind in enumerate(experts)}
    kept = found.manifest
    assert kept.iteration == iteration and kept.cursors["fake"] == 80 * iteration and kept.seed == 3
    assert found.shards.keys() == expected.keys() == kept.files.keys()
    assert all(same(found.shards[name], tensors) for name, tensors in expected.items())
    return True


class Death:
    """Counts operations and kills the process at the ``last`` one; ``seen``: a write's first half then shows."""

    def __init__(self, last: int, seen: bool = True) -> None:
        self.last, self.done, self.seen = last, 0, seen

    def comes(self) -> bool:
        self.done += 1
        return self.done == self.last

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def may_strike(self) -> None:
        if self.comes():
            self.strike()


class Dying:
    """Before a real file system: every operation that changes something may be the last, a write half done."""

    death: Death

    def _mortal(name: str) -> Any:  # noqa: N805
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.death.may_strike()
            return getattr(super(), name)(*args, **kwargs)

        return call

    create_dir, move, open_output_stream_ = _mortal("create_dir"), _mortal("move"), _mortal("open_output_stream")
    delete_file, delete_dir = _mortal("delete_file"), _mortal("delete_dir")

    def open_output_stream(self, *args: Any, **kwargs: Any) -> Any:
        return HalfWriter(self.death, self.open_output_stream_(*args, **kwargs))


class DyingLocal(Dying, fs.LocalFileSystem):
    pass


class DyingS3(Dying, fs.S3FileSystem):
    pass


class HalfWriter:
    """A stream into which the process may have written one half when it dies."""

    def __init__(self, death: Death, stream: Any) -> None:
        self.death, self.stream = death, stream

    def __enter__(self) -> "HalfWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.death.may_strike()
        self.stream.close()

    def write(self, content: Any) -> None:
        if self.death.comes():
            self.stream.write(content[: len(content) // 2])
            if self.death.seen:
                self.stream.close()
            self.death.strike()
        self.stream.write(content)


Steps = list[Callable[[Archive], Any]]


def save_and_die(
    make: Callable[[Death], Archive], steps: Steps, last: int, log: str, environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # a fork server has that of the test that started it
    death = Death(last)
    archive = make(death)
    with open(log, "ab", buffering=0) as progress:
        for step in steps:
            step(archive)
            death.may_strike()
            progress.write(b".")
    os._exit(0)


def killed_at(make: Callable[[Death], Archive], steps: Steps, last: int, log: Path) -> tuple[bool, int]:
    """Take the steps in a process that dies at operation ``last``; return whether it did, and the steps done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raydmd.runtime.checkpoint.manager"])
    process = context.Process(target=save_and_die, args=(make, steps, last, str(log), dict(os.environ)))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0, log.stat().st_size if log.exists() else 0


class Save:
    """A step: save an iteration, or an expert."""

    def __init__(self, iteration: int, experts: tuple[int, ...] = (), edge: bool = False) -> None:
        self.iteration, self.experts, self.edge = iteration, experts, edge

    def __call__(self, archive: Archive) -> None:
        states = {} if self.edge else shards(self.iteration)
        archive.save(manifest(self.iteration, experts=len(self.experts), phase=len(self.experts)), states)

    def is_there(self, found: Found) -> bool:
        return is_of(found, self.iteration, self.experts, self.edge)


class SaveExpert:
    """A step: save a finished expert, of some content."""

    def __init__(self, index: int, kind: int) -> None:
        self.index, self.kind = index, kind

    def __call__(self, archive: Archive) -> None:
        archive.save_expert(self.index, expert(self.kind))


def dying_here(folder: str, death: Death) -> Archive:
    archive = Archive(folder, keep=2)
    archive.store.files = DyingLocal()
    archive.store.files.death = death
    return archive


def at(port: int, folder: str) -> str:
    return f"s3://bucket/{folder}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


def dying_there(port: int, folder: str, seen: bool, death: Death) -> Archive:
    archive = Archive(at(port, folder), keep=2)
    options = {"scheme": "http", "endpoint_override": f"127.0.0.1:{port}", "region": "us-east-1"}
    archive.store.files, death.seen = DyingS3(**options), seen
    archive.store.files.death = death
    return archive


class InPlace(Store):
    """The negative control: what a store without care does, writing one checkpoint over the last."""

    def write(self, path: str, content: Any) -> tuple[str, int]:
        whole = b"".join(content)
        target = f"{self.root}/{path.replace('step-000006', 'step-000004')}"
        with self.files.open_output_stream(target) as stream:
            stream.write(whole)
        return hashlib.sha256(whole).hexdigest(), len(whole)


def careless(folder: str, death: Death) -> Archive:
    archive = dying_here(folder, death)
    archive.store.__class__ = InPlace
    return archive
