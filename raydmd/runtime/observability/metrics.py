"""The run's figures for Prometheus, through Ray's own metrics endpoint.

Ray shows each with the prefix ``ray_``; a counter's name gains ``_total`` there, a histogram's ``_bucket``, ``_count``
and ``_sum``. `exported` gives those names: the dashboard and the alerts in ``cluster/`` are held against it.
"""

import socket
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0]

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raydmd_iterations": ("iterations committed", ("phase",)),
    "raydmd_recoveries": ("losses of workers recovered from", ("role", "how")),
    "raydmd_zeroed_samples": ("samples left out for want of a finite gradient, by the role that made them", ("role",)),
    "raydmd_lost_steps": ("committed steps that a recovery took back", ()),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raydmd_iteration_seconds": ("seconds an iteration", ()),
    "raydmd_recovery_seconds": ("seconds from a loss to the next work", ("role",)),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "raydmd_role_utilisation": ("share of its workers' time that a role computes, 0 to 1", ("role",)),
    "raydmd_role_workers": ("workers of a role", ("role",)),
    "raydmd_role_waiting": ("workers of a role that are not placed yet", ("role",)),
    "raydmd_staleness": ("generator versions between a rollout and its use", ()),
    "raydmd_loss": ("a trained role's loss: fake, discriminator, latent ...", ("loss",)),
    "raydmd_gradient_norm": ("norm of a trained role's gradient before clipping", ("role",)),
    "raydmd_learning_rate": ("learning rate of a trained role's last update", ("role",)),
    "raydmd_queue_depth": ("calls sent and not finished", ()),
    "raydmd_checkpoint_bytes": ("bytes of the newest checkpoint", ()),
    "raydmd_checkpoint_seconds": ("seconds that the newest checkpoint took to write", ()),
}


def exported() -> set[str]:
    """Return the names that Ray's Prometheus endpoint shows for a run."""
    names = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    return names | {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")}


def run_label(folder: Path) -> str:
    """Return what tells a run from others in the metrics: its folder's name, and a hash of where that lies.

    Two runs of one recipe so have two labels, and a run that is continued in its folder keeps its own.
    """
    place = folder.resolve()
    return f"{place.name}-{blake2b(f'{socket.gethostname()}:{place}'.encode(), digest_size=3).hexdigest()}"


class Metrics:
    """What a run reports; needs a Ray that is up. Every figure has the tag ``run``.

    Args:
        run: the run's label, as `run_label` gives it.

    Attributes:
        run: the label.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._default = {"run": run}
        self._counters = {name: Counter(name, words, ("run", *tags)) for name, (words, tags) in COUNTERS.items()}
        self._gauges = {name: Gauge(name, words, ("run", *tags)) for name, (words, tags) in GAUGES.items()}
        self._histograms = {
            name: Histogram(name, words, SECONDS, ("run", *tags)) for name, (words, tags) in HISTOGRAMS.items()
        }
        for metric in (*self._counters.values(), *self._gauges.values(), *self._histograms.values()):
            metric.set_default_tags(self._default)

    def iteration(self, line: dict[str, Any]) -> None:
        """Report a committed iteration, given its line of metrics.jsonl."""
        seconds = max(float(line["seconds"]), 1e-9)
        self._count("raydmd_iterations", 1, phase=str(line["phase"]))
        self._histograms["raydmd_iteration_seconds"].observe(seconds)
        for role, figures in line["roles"].items():
            workers = figures["workers"]
            self._set("raydmd_role_workers", workers, role=role)
            share = figures["busy_seconds"] / (seconds * workers) if workers else 0.0
            self._set("raydmd_role_utilisation", share, role=role)
        for role, count in line["zeroed_samples"].items():
            self._count("raydmd_zeroed_samples", count, role=role)
        self._set("raydmd_staleness", line["staleness"])
        for key, value in line.items():
            if key.startswith("loss_"):
                self._set("raydmd_loss", value, loss=key.removeprefix("loss_"))
            elif key.endswith("_grad_norm"):
                self._set("raydmd_gradient_norm", value, role=key.removesuffix("_grad_norm"))
            elif key.endswith("_learning_rate"):
                self._set("raydmd_learning_rate", value, role=key.removesuffix("_learning_rate"))

    def queue(self, depth: int) -> None:
        """Report how many calls are sent and not finished."""
        self._set("raydmd_queue_depth", depth)

    def waiting(self, role: str, count: int) -> None:
        """Report how many workers of a role are not placed yet."""
        self._set("raydmd_role_waiting", count, role=role)

    def recovered(self, role: str, how: str, seconds: float, steps_lost: int) -> None:
        """Report that the run goes on after a loss.

        Args:
            role: whose worker was lost.
            how: what was done: a code of `raydmd.runtime.recovery.manager`.
            seconds: from the loss to the next work.
            steps_lost: committed steps that were taken back.
        """
        self._count("raydmd_recoveries", 1, role=role, how=how)
        self._count("raydmd_lost_steps", steps_lost)
        self._histograms["raydmd_recovery_seconds"].observe(float(seconds), {"role": role})

    def checkpoint(self, size: int, seconds: float) -> None:
        """Report a whole manifest: the bytes of its files, the seconds that it took."""
        self._set("raydmd_checkpoint_bytes", size)
        self._set("raydmd_checkpoint_seconds", seconds)

    def _count(self, name: str, value: int, **tags: str) -> None:
        if value > 0:  # Ray's counters refuse zero
            self._counters[name].inc(value, tags)

    def _set(self, name: str, value: float | None, **tags: str) -> None:
        if value is not None:  # a figure may be lost with the worker that had it
            self._gauges[name].set(float(value), tags)
