"""What manifests cost: in a run's iterations, and in seconds to write and read them back.

    share_of_iteration      what manifests as the digits recipe has them (batch 256) add to the mean iteration, over the
                            iteration without any
    share_every_iteration   the same with a manifest after every iteration; over the recipe's distance between manifests
                            it is the steadier estimate of share_of_iteration (_over_every)
    bytes                   of the digits' states in one manifest
    restore_seconds         to read them back from the system's cache of files, every byte checked
    large                   the same for a state made up of random numbers, 1 GB unless --gb says otherwise

The shares are medians over rounds in which a run without manifests and runs with them take turns.

    python benchmarks/checkpoint.py --json checkpoint.json
"""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, finish, teacher_folder
from rich.console import Console

from raydmd.config.recipe import Recipe
from raydmd.jsonl import read_lines
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import plan_phases
from raydmd.runtime.checkpoint.manager import Archive, Manifest
from raydmd.runtime.launch import distill
from raydmd.sampling.plan import plan_iterations

QUIET = Console(quiet=True)
NEVER = 10**6


def on_ray(recipe: Recipe, folder: Path, skip: int) -> tuple[float, int]:
    """Return the mean seconds of an iteration of a fresh run, each phase's first few left out, and its manifests."""
    shutil.rmtree(folder, ignore_errors=True)
    distill(recipe, folder, console=QUIET)
    seconds = [line["seconds"] for line in read_lines(folder / "metrics.jsonl")]
    written = [event for event in read_lines(folder / "events.jsonl") if event.get("event") == "checkpoint"]
    kept, at = [], 0
    for length in plan_iterations(recipe, plan_phases(recipe)):
        kept += seconds[at + skip : at + length]
        at += length
    return statistics.mean(kept), len(written)


def write_and_read(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """Return bytes, the seconds to write one manifest and to read it back, and MB/s of both."""
    shutil.rmtree(folder, ignore_errors=True)
    record = Manifest(
        iteration=1, phase=0, updates={"generator": 1, "fake": 5}, cursors={"generator": 256, "fake": 1280}, seed=0,
        experts=0,
    )  # fmt: skip
    since = time.perf_counter()
    written = Archive(str(folder)).save(record, shards)
    middle = time.perf_counter()
    found = Archive(str(folder)).newest()
    end = time.perf_counter()
    assert found.manifest == written, found.skipped
    size = sum(file["bytes"] for file in written.files.values())
    shutil.rmtree(folder)
    rates = {"write_mb_s": size / 1e6 / (middle - since), "restore_mb_s": size / 1e6 / (end - middle)}
    return {"bytes": size, "write_seconds": middle - since, "restore_seconds": end - middle, **rates}


def made_up(gigabytes: float) -> dict[str, dict[str, np.ndarray]]:
    """Return two roles' weights and moments that take so much together, in tensors of at most 64 MB."""
    rng, count = np.random.default_rng(0), max(1, round(gigabytes * 1e9 / 2 / 64e6))
    length = int(gigabytes * 1e9 / 2 / count / 4)
    return {
        role: {f"{i}": rng.random(length, dtype=np.float32) for i in range(count)} for role in ("generator", "fake")
    }


def main() -> None:
    """Measure all, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each comparison (default %(default)s)")
    parser.add_argument("--iterations", type=int, default=100, help="iterations of a run (default %(default)s)")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the large state (default %(default)s)")
    options = parser.parse_args()
    folder, usual = options.work / "checkpoint", load_recipe("digits").checkpoint.every
    settings = [f"teacher.path={teacher_folder('digits', options.work)}", f"iterations={options.iterations}"]
    settings += ["monitor.samples_every=0", "monitor.tensorboard=false", "batch.size=256", "batch.micro=null"]
    skip = min(3, options.iterations // 4)
    figures: dict[str, Any] = {"iterations": options.iterations, "rounds": options.rounds, "every": usual}

    seconds: dict[str, list[float]] = {}
    manifests: dict[str, int] = {}
    kinds = [("without", NEVER), ("usual", usual), ("every_iteration", 1)]
    for turn in range(options.rounds):
        for key, every in kinds if turn % 2 == 0 else reversed(kinds):  # so that a drift of the machine cancels
            recipe = load_recipe("digits", [*settings, f"checkpoint.every={every}"])
            mean, manifests[key] = on_ray(recipe, folder, skip)
            seconds.setdefault(key, []).append(mean)
    for name, key in (("share_of_iteration", "usual"), ("share_every_iteration", "every_iteration")):
        shares = [with_them / without - 1 for with_them, without in zip(seconds[key], seconds["without"], strict=True)]
        figures[name] = statistics.median(shares)
        figures[f"{name}_range"] = [min(shares), max(shares)]
    figures["share_every_iteration_over_every"] = figures["share_every_iteration"] / usual
    for key, values in seconds.items():
        figures[f"ms_{key}"] = 1e3 * statistics.median(values)
    figures["manifests"] = manifests  # those at the phases' ends, which a run without any has too, among them

    archive = Archive(str(folder / "checkpoints"))
    states = middle_of(archive)
    digits = [write_and_read(options.work / "checkpoint-digits", states) for _ in range(5)]
    for key in digits[0]:
        figures[key] = statistics.median(figure[key] for figure in digits)
    figures["bytes"] = int(figures["bytes"])
    large = write_and_read(options.work / "checkpoint-large", made_up(options.gb))
    figures |= {f"large_{key}": value for key, value in large.items()}
    finish("Checkpoints", figures, options.json)


def middle_of(archive: Archive) -> dict[str, dict[str, np.ndarray]]:
    """Return both trainers' states, from the manifest before the run's last one, which holds experts alone."""
    last = archive.peek()
    assert last is not None
    archive.store.delete(f"step-{last.iteration:06d}.json")
    return {name: archive.newest().shards[name] for name in ("generator", "fake")}


if __name__ == "__main__":
    main()
