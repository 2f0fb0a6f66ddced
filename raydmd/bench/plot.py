"""A picture of how a server takes load."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raydmd.bench.statistics import Statistics

BLUE, ORANGE, GREY = "#1f4e9c", "#c8590a", "#767676"


def plot(runs: Sequence[Statistics], path: Path, title: str) -> None:
    """Draw latency, and throughput and goodput, against the load offered.

    Args:
        runs: loads of one kind, in any order.
        path: of the picture; its ending says the format.
        title: above the picture.
    """
    runs = sorted(runs, key=lambda run: run.load.level)
    levels = [run.load.level for run in runs]
    closed = runs[0].load.kind == "closed"
    figure = Figure(figsize=(8.0, 3.4), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    for percentile, style, colour in ((99, "s--", ORANGE), (50, "o-", BLUE)):
        points = [(run.load.level, run.latency.percentiles[percentile]) for run in runs if run.latency]
        if points:
            left.plot(*zip(*points, strict=True), style, color=colour, label=f"p{percentile}", markersize=4.5)
    if not closed:
        left.set_yscale("log")  # past saturation it grows by orders of magnitude
    slo = next((run.slo for run in runs if run.slo is not None), None)
    if slo is not None:
        left.axhline(slo, color=GREY, linewidth=1, linestyle=":", label=f"SLO {slo:g} s")
    left.set_ylabel("latency (s)")
    if not closed:
        right.plot(levels, levels, ":", color=GREY, linewidth=1, label="offered")
    right.plot(levels, [run.requests_per_second for run in runs], "o-", color=BLUE, label="completed", markersize=4.5)
    if slo is not None:
        good = [run.goodput or 0.0 for run in runs]
        right.plot(levels, good, "s--", color=ORANGE, label=f"goodput (within {slo:g} s)", markersize=4.5)
    right.set_ylabel("requests a second")
    for axes in (left, right):
        _dress(axes, "requests at once" if closed else "offered requests a second", closed)
    if closed:
        left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _dress(axes: Axes, label: str, whole: bool) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
