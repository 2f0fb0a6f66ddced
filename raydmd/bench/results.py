"""Figures as JSON and as a table."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from raydmd.atomic import write_text
from raydmd.bench.load import Outcome, Record
from raydmd.bench.statistics import PERCENTILES, Spread, Statistics


def vllm_names(figures: Statistics) -> dict[str, Any]:
    """Return the figures under the names that vLLM's `vllm bench serve` (vllm/benchmarks/serve.py) writes.

    Those of tokens are left out. ``failed`` is every request that was not completed, the rejected ones too. Seconds
    are milliseconds here. What is not known is None.
    """
    closed = figures.load.kind == "closed"
    latency = figures.latency
    return {
        "duration": figures.duration,
        "completed": figures.completed,
        "failed": figures.failed + figures.rejected,
        "num_prompts": figures.offered,
        "request_rate": "inf" if closed else figures.load.level,
        "burstiness": 1.0 if figures.load.kind == "open" else None,
        "max_concurrency": int(figures.load.level) if closed else None,
        "max_concurrent_requests": figures.most,
        "request_throughput": figures.requests_per_second,
        "request_goodput": figures.goodput,
        "mean_e2el_ms": _milli(latency, "mean"),
        "median_e2el_ms": _milli(latency, 50),
        "std_e2el_ms": _milli(latency, "std"),
        **{f"p{p}_e2el_ms": _milli(latency, p) for p in PERCENTILES},
    }


def sglang_names(figures: Statistics) -> dict[str, Any]:
    """Return the figures under the names of SGLang-diffusion's and vLLM-omni's benchmarks.

    They are ``duration`` to ``latency_p50`` in sglang/multimodal_gen/benchmarks/bench_serving.py; vLLM-omni's
    benchmarks/diffusion/diffusion_benchmark_serving.py has them too, and ``latency_p95``, ``slo_*`` and
    ``stage_durations_*``. Times are in seconds.
    """
    latency = figures.latency
    return {
        "duration": figures.duration,
        "completed_requests": figures.completed,
        "failed_requests": figures.failed + figures.rejected,
        "throughput_qps": figures.requests_per_second,
        "latency_mean": latency and latency.mean,
        "latency_median": latency and latency.percentiles[50],
        **{f"latency_p{p}": latency and latency.percentiles[p] for p in PERCENTILES},
        "stage_durations_mean": {name: spread.mean for name, spread in figures.stages.items()},
        "stage_durations_p50": {name: spread.percentiles[50] for name, spread in figures.stages.items()},
        "stage_durations_p99": {name: spread.percentiles[99] for name, spread in figures.stages.items()},
        "slo_attainment_rate": figures.good_share,
        "slo_met_success": figures.good if figures.slo is not None else None,
    }


def own_names(figures: Statistics) -> dict[str, Any]:
    """Return what the others have no name for. Times are in seconds."""
    return {
        "load": figures.load.kind,
        "level": figures.load.level,
        "images": figures.images,
        "images_per_second": figures.images_per_second,
        "rejected": figures.rejected,
        "failed_otherwise": figures.failed,
        "failures": figures.failures,
        "slo_seconds": figures.slo,
        "latency_max": figures.latency and figures.latency.max,
        "rejection": _spread(figures.rejection),
        "late_dispatch": _spread(figures.late),
        "seconds_by_stage": {name: _spread(spread) for name, spread in figures.stages.items()},
        "batch_by_stage": figures.batches,
        "client_cpu_seconds": figures.cpu,
        "price_per_hour": figures.price,
        "cost_per_image": figures.cost_per_image,
        "interrupted": figures.interrupted,
    }


def as_json(figures: Statistics) -> dict[str, Any]:
    """Return one load's figures under all names, as plain values."""
    return {**own_names(figures), **sglang_names(figures), **vllm_names(figures)}


def detail(outcome: Outcome) -> dict[str, Any]:
    """Return one request as plain values; times are in seconds from the load's start."""
    request, answer = outcome.request, outcome.answer
    return {
        "number": request.number, "prompt": request.prompt, "n": request.n, "seed": request.seed,
        "size": request.size and "x".join(map(str, request.size)), "kind": answer.kind, "error": answer.error,
        "scheduled": outcome.scheduled, "sent": outcome.sent, "finished": outcome.finished,
        "latency": outcome.latency, "seconds": dict(answer.seconds), "batches": dict(answer.batches),
    }  # fmt: skip


def write_json(path: Path, about: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    """Write the loads' figures as ``runs``; a single load's lie at the top, too, as the other harnesses have them."""
    tree = {"date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"), **about, "runs": list(runs)}
    if len(runs) == 1:
        tree = {**runs[0], **tree}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def failures(records: Sequence[Record]) -> str | None:
    """Say in one line how many requests failed, and why; None where none did. To be rejected is no failure."""
    answers = [outcome.answer for record in records for outcome in record.outcomes]
    failed = [answer for answer in answers if answer.kind not in ("ok", "rejected")]
    if not failed:
        return None
    whys = Counter(f"{answer.error}: {' '.join(answer.why.split())[:200]}".rstrip(": ") for answer in failed)
    told = "; ".join(f"{count} x {why}" for why, count in whys.most_common(3))
    more = f"; and {len(whys) - 3} other reasons" if len(whys) > 3 else ""
    return f"{len(failed)} of {len(answers)} requests failed: {told}{more}"


def print_table(console: Console, title: str, runs: Sequence[Statistics]) -> None:
    """Print the loads side by side, a column each."""
    table = Table("", *(run.load.name for run in runs), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, *values: float | None, digits: str = ".4g") -> None:
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else format(value, digits) for value in values))

    row("requests", *(run.offered for run in runs), digits="d")
    row("requests/s", *(run.requests_per_second for run in runs))
    row("images/s", *(run.images_per_second for run in runs))
    row("latency, mean (ms)", *(_milli(run.latency, "mean") for run in runs))
    for p in PERCENTILES:
        row(f"p{p} (ms)", *(_milli(run.latency, p) for run in runs))
    row("max (ms)", *(_milli(run.latency, "max") for run in runs))
    for slo in sorted({run.slo for run in runs if run.slo is not None}):
        row(f"goodput, within {slo:g} s (/s)", *(run.goodput for run in runs))
        row("share of all sent", *(run.good_share for run in runs), digits=".1%")
    row("rejected", *(run.rejected for run in runs), digits="d")
    if any(run.rejected for run in runs):
        row("  their p99 (ms)", *(_milli(run.rejection, 99) for run in runs))
    row("failed", *(run.failed for run in runs), digits="d")
    for kind in sorted({kind for run in runs for kind in run.failures}):
        row(f"  {kind}", *(run.failures.get(kind, 0) for run in runs), digits="d")
    for name in ordered({name: None for run in runs for name in run.stages}):
        spreads = [run.stages.get(name) for run in runs]
        row(f"{name}, mean (ms)", *(_milli(spread, "mean") for spread in spreads))
    for name in ordered({name: None for run in runs for name in run.batches}):
        row(f"batch in {name}, mean", *(run.batches.get(name) for run in runs))
    if any(run.load.kind != "closed" for run in runs):
        row("sent late, p99 (ms)", *(_milli(run.late, 99) for run in runs))
    row("client's CPU (s)", *(run.cpu for run in runs))
    row("cost an image", *(run.cost_per_image for run in runs))
    console.print(table, highlight=False, markup=False)
    if any(run.interrupted for run in runs):
        console.print("interrupted: the last column is what there was by then", highlight=False)


def ordered(names: dict[str, None]) -> list[str]:
    """Return stages' names on the way of a request: waiting first, the sum last."""
    place = {"queue": 0, "encode": 1, "teacher": 3, "decode": 4, "total": 6}
    return sorted(names, key=lambda name: (place.get(name, 2 if name.startswith("expert") else 5), name))


def _milli(spread: Spread | None, what: int | Literal["mean", "std", "max"]) -> float | None:
    """Return a percentile, or another of a spread's figures, in milliseconds."""
    if spread is None:
        return None
    return 1e3 * (spread.percentiles[what] if isinstance(what, int) else getattr(spread, what))


def _spread(spread: Spread | None) -> dict[str, float] | None:
    if spread is None:
        return None
    cuts = {f"p{p}": value for p, value in spread.percentiles.items()}
    return {"mean": spread.mean, **cuts, "max": spread.max}
