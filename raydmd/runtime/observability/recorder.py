"""What a run leaves to be seen: metrics.jsonl, events.jsonl, TensorBoard, sample grids, a progress bar."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raydmd.atomic import replacing, storage_error, writing
from raydmd.config.recipe import Recipe
from raydmd.jsonl import LineWriter, mend_lines
from raydmd.methods.program import trace_method
from raydmd.progress import time_left
from raydmd.runtime.checkpoint.lock import Claim
from raydmd.runtime.observability.metrics import Metrics, run_label
from raydmd.runtime.observability.weights_and_biases import WandbRun, is_wanted
from raydmd.runtime.recovery.state import RunState
from raydmd.runtime.workers.base import CallStats
from raydmd.training.zeroed import in_words

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RECENT = 100  # iterations by which the time that is left is told
ZEROED_EVERY = 50  # iterations between two events, or two warnings, of samples that were left out


class Recorder:
    """Writes a run's records into its folder and shows its progress.

    Args:
        folder: the run's folder.
        recipe: its recipe.
        total: iterations in all.
        console: where progress is shown.
        claim: the driver's claim on the folder, looked at with every iteration; None: there is none.
        state: the run's state; default: one of its own.

    Attributes:
        last_commit: time.time() of the last iteration; None: none was yet.

    Raises:
        StorageError: the disk is full or gone.
        UserError: the run cannot be begun in Weights & Biases.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, total: int, console: Console, claim: Claim | None = None,
        state: RunState | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.recipe, self.total, self.console, self.claim = folder, recipe, total, console, claim
        self.state, self.trace = state or RunState(), trace_method(recipe)
        self.last_commit: float | None = None
        self._repair("events.jsonl", lambda record: True if isinstance(record.get("event"), str) else None)
        self._events = LineWriter(folder / "events.jsonl")
        self._metrics: LineWriter | None = None
        self._board: SummaryWriter | None = None
        self._wandb = WandbRun(recipe, folder, self.say) if is_wanted(recipe) else None
        self.exported = Metrics(run_label(folder))
        roles = self.trace.method.roles
        self.shown = [  # what is drawn of a line
            key
            for role in self.trace.method.trained()
            for key in (*roles[role].part.figures, f"{role}_grad_norm", f"{role}_learning_rate")
        ]
        self._zeroed_event = self._zeroed_warning = -ZEROED_EVERY  # the iterations of the last ones
        self._since = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds of the last iterations
        self._excepthook, threading.excepthook = threading.excepthook, self._of_a_thread
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
        self._task = self._progress.add_task("run", total=total, completed=0, phase="starting", figures="")
        self._progress.start()

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to events.jsonl."""
        self._events.append({"time": round(time.time(), 3), "event": kind, **facts})

    def rewind(self, done: int) -> None:
        """Drop what was written of iterations from ``done`` on, as they are made again, and lines that are broken.

        Raises:
            StorageError: the disk is full or gone.
        """
        if self._metrics is not None:
            self._metrics.close()

        def stays(line: dict[str, Any]) -> bool | None:
            n = line.get("iteration")
            return n < done if type(n) is int else None

        self._repair("metrics.jsonl", stays, "iteration")
        self._metrics = LineWriter(self.folder / "metrics.jsonl")
        if self.recipe.monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # and TensorBoard, half a second

            with writing(self.folder / "tensorboard"):
                if self._board is not None:
                    self._board.close()
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done)
        self._progress.update(self._task, completed=done)

    def seconds_left(self, iterations: int) -> float | None:
        """Return how long so many more will take, by the last ones; None: there are none."""
        recent = list(self._recent)
        return iterations * sum(recent) / len(recent) if recent else None

    def recovered(self, roles: list[str], how: str, seconds: float, steps_lost: int) -> None:
        """Count a recovery in the exported metrics."""
        for role in roles:
            self.exported.recovered(role, how, seconds, steps_lost)

    def begin(self) -> None:
        """Count seconds from here: the workers are up."""
        self._since = time.perf_counter()

    def say(self, words: str) -> None:
        """Show a line to the user."""
        self.console.print(words, highlight=False, markup=False, soft_wrap=True)

    def iteration(
        self, phase: int, iteration: int, call_stats: list[CallStats], workers: dict[str, int], queue: int = 0
    ) -> dict[str, Any]:
        """Write the metrics of a committed iteration, from its calls' statistics; null where these were lost.

        Raises:
            StorageError: the disk is full or gone, the folder was removed, or another driver has taken it over.
        """
        if self.claim is not None:
            self.claim.check()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        busy = dict.fromkeys(workers, 0.0)
        for stats in call_stats:
            busy[stats.role] += stats.busy_seconds
        zeroed: Counter[str] = Counter()
        line: dict[str, Any] = {"phase": phase + 1, "iteration": iteration}
        for role, version in self.trace.updates_before(iteration + 1).items():
            updates = [s.figures for s in call_stats if s.role == role and s.figures is not None]
            micro = [row for figures in updates for row in figures.micro]
            line |= {f"{role}_version": version, f"{role}_grad_norm": _mean(figures.norm for figures in updates)}
            line[f"{role}_learning_rate"] = max(((s.version, s.lr) for s in updates), default=(0, None))[1]
            for name in self.trace.method.roles[role].part.figures:
                line[name] = _mean(value for _, value in sorted((start, row[name]) for start, row in micro))
            for figures in updates:
                zeroed.update(figures.zeroed)
        line |= {
            "staleness": max((stats.staleness for stats in call_stats), default=None),
            "samples": self.recipe.batch.size,
            "zeroed_samples": dict(zeroed),
            "seconds": seconds,
            "roles": {role: {"busy_seconds": busy[role], "workers": count} for role, count in workers.items()},
        }
        if self.recipe.prompts.buckets is not None:
            line["buckets"] = self.trace.buckets(iteration)
        assert self._metrics is not None
        self._metrics.append(line)
        self._recent.append(seconds)
        self.last_commit = time.time()
        self.exported.iteration(line)
        self.exported.queue(queue)
        self._show(line)
        if zeroed:
            self._tell_zeroed(iteration, dict(zeroed))
        return line

    def pictures(self, name: str, pictures: np.ndarray) -> None:
        """Write a grid of pictures [N, C, H, W] in [0, 1] to samples/NAME.png.

        Raises:
            StorageError: the disk is full or gone.
        """
        from raydmd.evaluation.pictures import grid

        path = self.folder / "samples" / f"{name}.png"
        image = grid(pictures)
        with replacing(path) as part:
            image.save(part, format="PNG")
        kind, _, number = name.partition("-")
        if self._board is not None:
            self._board.add_image(kind, np.asarray(image.convert("RGB")), dataformats="HWC")
        if self._wandb is not None:
            self._wandb.picture(kind, np.asarray(image.convert("RGB")), int(number) - 1 if number else 0)

    def close(self) -> None:
        """Finish all records; what TensorBoard still holds is lost where the disk is full or gone."""
        self._progress.stop()
        if self._metrics is not None:
            self._metrics.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                if storage_error(self.folder, error) is None:
                    raise
        threading.excepthook = self._excepthook

    def _of_a_thread(self, error: Any) -> None:
        """Keep TensorBoard's thread quiet about a full disk, which who writes next is told of."""
        boards = type(error.thread).__module__.startswith("tensorboard")
        if not boards or storage_error(self.folder, error.exc_value) is None:
            self._excepthook(error)

    def _repair(self, name: str, wanted: Callable[[dict[str, Any]], bool | None], key: str | None = None) -> None:
        if broken := mend_lines(self.folder / name, wanted, key):
            self.say(f"{self.folder / name}: {broken} broken line(s) were removed")

    def _tell_zeroed(self, iteration: int, zeroed: dict[str, int]) -> None:
        """Write an event of samples that were left out, and warn of many; again only after a while, unless of more."""
        settings, share = self.recipe.monitor, sum(zeroed.values()) / self.recipe.batch.size
        if iteration >= self._zeroed_event + ZEROED_EVERY or share > settings.zeroed_end_share:
            self._zeroed_event = iteration
            self.event("zeroed", iteration=iteration, samples=sum(zeroed.values()), share=share, roles=zeroed)
        if share > settings.zeroed_warn_share and iteration >= self._zeroed_warning + ZEROED_EVERY:
            self._zeroed_warning = iteration
            self.say(f"warning: iteration {iteration}: {in_words(zeroed, self.recipe.batch.size)}")

    def _show(self, line: dict[str, Any]) -> None:
        used = {
            role: figures["busy_seconds"] / max(line["seconds"], 1e-9) / max(figures["workers"], 1)
            for role, figures in line["roles"].items()
        }
        known = [name for name in self.shown if "loss" in name and line[name] is not None]  # of roles with an update
        losses = [f"{name.removeprefix('loss_')} {line[name]:.3f}" for name in known]
        norm = line[f"{self.trace.method.student}_grad_norm"] or 0.0
        busy = [f"{role[0].upper()} {min(share, 1):.0%}" for role, share in used.items()]
        figures = "  ".join([*losses, f"|g| {norm:.3g}", f"busy {' '.join(busy)}"])
        done = line["iteration"] + 1
        self._progress.update(self._task, completed=done, phase=f"phase {line['phase']}", figures=figures)
        if not self.console.is_terminal and (done % max(self.total // 10, 1) == 0 or done == self.total):
            left = time_left(self.total - done, self._recent)
            self.say(
                f"phase {line['phase']}  {done}/{self.total}  {figures}  {line['seconds']:.2f} s an iteration, {left}"
            )
        drawn = {key: line[key] for key in (*self.shown, "seconds") if line[key] is not None}
        drawn |= {f"utilisation/{role}": share for role, share in used.items()}
        if self._board is not None:
            with writing(self.folder / "tensorboard"):
                for key, value in drawn.items():
                    self._board.add_scalar(key, value, line["iteration"])
        if self._wandb is not None:
            self._wandb.figures(line["iteration"], drawn)


def _mean(values: Iterable[float]) -> float | None:
    values = [value for value in values if math.isfinite(value)]  # JSON has no others
    return float(np.mean(values)) if values else None
