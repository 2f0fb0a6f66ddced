"""What a run leaves to be seen: metrics.jsonl, events.jsonl, TensorBoard, sample grids, a progress bar."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from raydmd.config import Recipe
from raydmd.folders import read_lines
from raydmd.runtime.workers import Receipt


class Recorder:
    """Writes a run's records into its folder and shows its progress.

    Args:
        folder: the run's folder.
        recipe: its recipe.
        total: iterations in all.
        done: iterations already committed by an earlier start; later lines of metrics.jsonl are dropped.
        console: where progress is shown.
    """

    def __init__(self, folder: Path, recipe: Recipe, total: int, done: int, console: Console) -> None:
        self.folder, self.recipe, self.total, self.console = folder, recipe, total, console
        kept = [line for line in read_lines(folder / "metrics.jsonl") if line["iteration"] < done]
        part = folder / "metrics.jsonl.part"
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        part.replace(folder / "metrics.jsonl")
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = (folder / "events.jsonl").open("a", encoding="utf-8")
        self._board = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=done) if recipe.monitor.tensorboard else None
        )
        self._since = time.perf_counter()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[phase]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("run", total=total, completed=done, phase="starting", figures="")
        self._progress.start()

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to events.jsonl."""
        self._events.write(json.dumps({"time": round(time.time(), 3), "event": kind, **facts}) + "\n")
        self._events.flush()

    def begin(self) -> None:
        """Count seconds from here: the workers are up."""
        self._since = time.perf_counter()

    def say(self, words: str) -> None:
        """Show a line to the user."""
        self.console.print(words, highlight=False, markup=False, soft_wrap=True)

    def iteration(self, phase: int, iteration: int, receipts: list[Receipt], workers: dict[str, int]) -> dict[str, Any]:
        """Write the metrics of a committed iteration, from the receipts of all its calls."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        busy = dict.fromkeys(workers, 0.0)
        for receipt in receipts:
            busy[receipt.role] += receipt.busy_seconds
        fake = [r.figures for r in receipts if r.role == "fake" and r.figures is not None]
        generator = [r.figures for r in receipts if r.role == "generator" and r.figures is not None]
        micro = sorted(row for figures in generator for row in figures.micro)
        losses = sorted(row for figures in fake for row in figures.losses)
        rollouts = [made for r in receipts if r.role == "fake" and r.figures is not None for made, _ in r.versions]
        version = generator[0].version
        line = {
            "phase": phase + 1,
            "iteration": iteration,
            "generator_version": version,
            "fake_version": max(figures.version for figures in fake),
            "loss_fake": float(np.mean([loss for _, loss in losses])),
            "generator_grad_norm": generator[0].norm,
            "fake_grad_norm": float(np.mean([figures.norm for figures in fake])),
            "dm_gradient": float(np.mean([row[1] for row in micro])),
            "x_s_mean": float(np.mean([row[2] for row in micro])),
            "x_s_std": float(np.mean([row[3] for row in micro])),
            "staleness": version - 1 - min(rollouts),
            "samples": self.recipe.batch.size,
            "seconds": seconds,
            "roles": {role: {"busy_seconds": busy[role], "workers": count} for role, count in workers.items()},
        }
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self._show(line)
        return line

    def pictures(self, name: str, pictures: np.ndarray) -> None:
        """Write a grid of pictures [N, C, H, W] in [0, 1] to samples/NAME.png."""
        from raydmd.evaluation.pictures import grid

        path = self.folder / "samples" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        image = grid(pictures)
        image.save(part, format="PNG")
        part.replace(path)
        if self._board is not None:
            self._board.add_image(name.split("-")[0], np.asarray(image.convert("RGB")), dataformats="HWC")

    def close(self) -> None:
        """Finish all records."""
        self._progress.stop()
        self._metrics.close()
        self._events.close()
        if self._board is not None:
            self._board.close()

    def _show(self, line: dict[str, Any]) -> None:
        used = {
            role: figures["busy_seconds"] / max(line["seconds"], 1e-9) / figures["workers"]
            for role, figures in line["roles"].items()
        }
        figures = f"fake {line['loss_fake']:.3f}  |g| {line['generator_grad_norm']:.3g}  busy " + " ".join(
            f"{role[0].upper()} {min(share, 1):.0%}" for role, share in used.items()
        )
        done = line["iteration"] + 1
        self._progress.update(self._task, completed=done, phase=f"phase {line['phase']}", figures=figures)
        if not self.console.is_terminal and (done % max(self.total // 10, 1) == 0 or done == self.total):
            self.say(f"phase {line['phase']}  {done}/{self.total}  {figures}  {line['seconds']:.2f} s an iteration")
        if self._board is not None:
            for key in ("loss_fake", "generator_grad_norm", "dm_gradient", "x_s_mean", "x_s_std", "seconds"):
                self._board.add_scalar(key, line[key], line["iteration"])
            for role, share in used.items():
                self._board.add_scalar(f"utilisation/{role}", share, line["iteration"])
