"""Serving under load: what HTTP and Ray Serve cost, what a machine yields, and what too much of a load does.

The runs are those of serving_runs.py: ``digits`` (a pass of .4 ms) shows what serving itself costs, ``bench`` (10 ms,
as networks that are worth a server) what is left of the machine. Clients run on the same machine.

- ``overhead``: digits, one request at a time: HTTP's p50 less that of the same request in one process, without HTTP
  or Ray.
- ``saturation``: bench, images/s of the best layout and concurrency over those of a loop in process at its best batch
  size, which may use the cores as it likes: one process of two threads, or two of one.
- ``teacher``: bench, images/s of the 4-step student over those of its teacher with guidance (40 steps, 80 passes),
  through the same server.
- ``plain``: images/s over those of plain_loop.py, 32 requests at once.
- ``sweep``: bench, open loop: goodput against the offered rate, up to twice what the server can do.
- ``kills``: digits, replicas of experts killed under load: requests that fail.
- ``endurance``: digits, the memory of all of the server's processes before and after 20,000 requests.

Each can be run alone (--only); figures are then added to those in the --json file.

It wants an idle machine, and takes 25 minutes.

    python benchmarks/serve_load.py --json serve_load.json --picture serve_load.png
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from common import arguments, console, finish
from rich.table import Table
from serving_runs import bench_run, digits_run, measure

from raydmd.bench.arrivals import Mix
from raydmd.bench.load import Record, closed_loop
from raydmd.bench.plot import plot
from raydmd.bench.results import as_json
from raydmd.bench.session import Plan, Session
from raydmd.bench.statistics import Load, Statistics, summarize
from raydmd.bench.targets import HttpTarget, LocalTarget
from raydmd.serving.contract import Maker
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Serving

MIX = Mix(tuple(str(digit) for digit in range(10)))
START_SECONDS = 120.0
ROUNDS, SATURATION_ROUNDS = 7, 3
TWO = ["--set", "stages.expert.min=2", "--set", "stages.expert.max=2"]
LAYOUTS = {
    "colocated": [],
    "colocated, 2 threads": ["--set", "stages.expert.threads=2"],
    "colocated, 2 replicas": TWO,
    "colocated, 2 replicas, batches of 32": [*TWO, "--set", "max_batch=32"],
    "pipelined": ["--layout", "pipelined"],
}
TEACHERS = {  # as many cores as the student has
    "colocated, 2 threads": ["--set", "stages.teacher.threads=2"],
    "colocated, 2 replicas": ["--set", "stages.teacher.min=2", "--set", "stages.teacher.max=2"],
    "colocated, 2 replicas, batches of 32": ["--set", "stages.teacher.min=2", "--set", "stages.teacher.max=2"],
    "pipelined": ["--set", "stages.teacher.min=2", "--set", "stages.teacher.max=2"],
}
PROXIES = {
    "default": [],
    "fast": ["--fast"],
    "serve_proxy": ["--proxy", "serve"],
    "serve_proxy_fast": ["--proxy", "serve", "--fast"],
}
CLOSED = (32, 64, 128)
ENDURANCE = (2_000, 20_000)  # requests before memory is looked at first, and after
KILLS, KILL_CONCURRENCY = 6, 16
PLAIN_CONCURRENCY = 32
RATES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0)  # of what saturation yields


class Server(NamedTuple):
    """A server that runs."""

    url: str
    pid: int

    def family(self) -> list[psutil.Process]:
        """Return its processes."""
        return [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]

    def replicas(self, name: str) -> list[psutil.Process]:
        """Return the processes of a deployment's replicas."""
        found = []
        for each in self.family():
            with suppress(psutil.NoSuchProcess):
                if f"ServeReplica:raydmd:{name}" in " ".join(each.cmdline()):
                    found.append(each)
        return found

    def megabytes(self) -> float:
        """Return the memory of all of its processes, what they share counted once."""
        total = 0
        for each in self.family():
            with suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
        return total / 2**20


@contextmanager
def process(command: Sequence[str], port: int) -> Iterator[Server]:
    """Run a server, and yield it once it says its URL; it is stopped as with Ctrl-C."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline, look = time.monotonic() + START_SECONDS, threading.Event()
            while url not in (said := Path(log.name).read_text(encoding="utf-8", errors="replace")):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"no server: {' '.join(command)}\n{said[-2000:]}")
                look.wait(0.1)
            yield Server(url, server.pid)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def ours(run: Path, *settings: str) -> Any:
    """Return `process` of `raydmd serve`."""
    port = free_port()
    code = "from raydmd.cli import main; main()"
    return process([sys.executable, "-c", code, "serve", str(run), "--port", str(port), *settings], port)


def plain(run: Path, threads: int) -> Any:
    """Return `process` of the plain loop."""
    port, script = free_port(), Path(__file__).with_name("plain_loop.py")
    return process([sys.executable, str(script), str(run), "--port", str(port), "--threads", str(threads)], port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def load(url: str, loads: Sequence[Load], seconds: float, slo: float | None = None, model: str | None = None) \
        -> list[Statistics]:  # fmt: skip
    """Load a server; return a load's figures each."""

    async def drive() -> list[Statistics]:
        async with HttpTarget(url, model) as target:
            await target.look()
            session = Session(target, Plan(loads, MIX, seconds=seconds, slo=slo))
            await session.run()
            return session.done

    return asyncio.run(drive())


def closed(*levels: int) -> list[Load]:
    return [Load("closed", level) for level in levels]


def best(done: Sequence[Statistics]) -> Statistics:
    return max(done, key=lambda figures: figures.images_per_second)


def _work(
    run: str, maker: Maker, max_batch: int, threads: int, concurrency: int, seconds: float, barrier: Barrier, pipe: Any
) -> None:
    async def drive() -> Statistics:
        serving = Serving(run=run, max_batch=max_batch, teacher=maker == "teacher")
        target, record = LocalTarget(local_pipeline(serving, threads), maker), Record()
        await closed_loop(target, MIX, concurrency, 2 * concurrency, None, Record(), stream=1)
        barrier.wait()
        await closed_loop(target, MIX, concurrency, None, seconds, record)
        return summarize(Load("closed", concurrency), record)

    pipe.send(asyncio.run(drive()))


def in_process(
    run: Path, seconds: float, *, processes: int = 1, threads: int = 1, max_batch: int = 16, concurrency: int = 1
) -> list[Statistics]:
    """Make pictures without HTTP or Ray in processes of their own, all at the same time; return each one's figures."""
    context = multiprocessing.get_context("spawn")
    barrier, pipes, workers = context.Barrier(processes), [], []
    for _ in range(processes):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(str(run), "student", max_batch, threads, concurrency, seconds, barrier, there)
        )
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    done = [pipe.recv() for pipe in pipes]
    for worker in workers:
        worker.join()
    return done


def overhead(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """One request at a time, in turns with the same in process."""
    run, seconds = digits_run(options.work).folder, options.seconds / 2
    table = Table("one request at a time", "in process, p50 (ms)", "HTTP, p50 (ms)", "p99 (ms)", title="overhead")
    for name, settings in PROXIES.items():
        inside, outside = [], []
        with ours(run, *settings) as server:
            for _ in range(ROUNDS):
                inside.append(in_process(run, seconds)[0])
                outside += load(server.url, closed(1), seconds)
        pairs = [(1e3 * a.latency.percentiles[50], 1e3 * b.latency.percentiles[50])
                 for a, b in zip(inside, outside, strict=True) if a.latency and b.latency]  # fmt: skip
        figures[f"overhead_ms_{name}"] = statistics.median(b - a for a, b in pairs)
        figures[f"overhead_rounds_{name}"] = pairs
        p99 = statistics.median(1e3 * b.latency.percentiles[99] for b in outside if b.latency)
        table.add_row(name, *(f"{statistics.median(column):.2f}" for column in zip(*pairs, strict=True)), f"{p99:.2f}")
    console.print(table)


def saturation(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """As much as there is, of the server and of a loop in process: the best of each is found, then both in turns."""
    run = bench_run(options.work)
    figures["bench_pass_ms"] = measure(run, 1)
    table = Table("bench", "concurrency", "images/s", "p50 (ms)", "p99 (ms)", title="saturation")
    loops: dict[str, float] = {}
    ways: dict[str, dict[str, int]] = {}
    for processes, threads in ((1, 2), (2, 1)):
        for batch in (4, 8, 16, 32):
            name = f"in process: {processes} x {threads} threads, batches of {batch}"
            ways[name] = {
                "processes": processes, "threads": threads, "max_batch": batch, "concurrency": 2 * batch
            }  # fmt: skip
            done = in_process(run.folder, options.seconds, **ways[name])
            loops[name] = sum(part.images_per_second for part in done)
            row(table, name, done[0], loops[name])
    servers: dict[str, Statistics] = {}
    for mode in ([], ["--fast"]):
        for layout, settings in LAYOUTS.items():
            with ours(run.folder, *settings, *mode) as server:
                done = load(server.url, closed(*CLOSED), options.seconds)
            name = f"{layout}{', fast' if mode else ''}"
            servers[name] = best(done)
            for one in done:
                row(table, name, one)
    figures["saturation_best"] = max(servers, key=lambda name: servers[name].images_per_second)
    loop, level = max(loops, key=lambda name: loops[name]), int(servers[figures["saturation_best"]].load.level)
    rounds = []
    with ours(run.folder, *chosen(figures)[1]) as server:
        for _ in range(SATURATION_ROUNDS):
            inside = sum(part.images_per_second for part in in_process(run.folder, 2 * options.seconds, **ways[loop]))
            one = load(server.url, closed(level), 2 * options.seconds)[0]
            rounds.append((one.images_per_second, inside))
            row(table, f"{figures['saturation_best']}, in turns with", one)
            row(table, loop, one, inside)
    console.print(table)
    figures |= {
        "saturation_ratio": statistics.median(ours / loop for ours, loop in rounds),
        "saturation_images_per_second": statistics.median(ours for ours, _ in rounds),
        "saturation_rounds": rounds,
        "saturation_loops": loops,
        "saturation_servers": {name: as_json(one) for name, one in servers.items()},
    }


def chosen(figures: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the layout that saturation found best, and its settings; two replicas if it did not look."""
    name = figures.get("saturation_best", "colocated, 2 replicas, fast")
    layout = name.removesuffix(", fast")
    return layout, LAYOUTS[layout] + (["--fast"] if name.endswith(", fast") else [])


def teacher(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Student and teacher through one server, one after the other."""
    run = bench_run(options.work)
    layout, settings = chosen(figures)
    with ours(run.folder, "--teacher", *settings, *TEACHERS.get(layout, [])) as server:
        student = best(load(server.url, closed(*CLOSED), options.seconds))
        many = best(load(server.url, closed(*CLOSED[:2]), 2 * options.seconds, model=f"{run.name}-teacher"))
    table = Table("bench", "concurrency", "images/s", "p50 (ms)", "p99 (ms)", title=f"student and teacher ({layout})")
    row(table, "student, 4 passes", student)
    row(table, f"teacher, {run.recipe.teacher.steps} steps with guidance", many)
    console.print(table)
    figures |= {
        "over_teacher": student.images_per_second / many.images_per_second,
        "teacher_student": as_json(student),
        "teacher_teacher": as_json(many),
    }


def plain_loops(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Our server in fast mode and the plain loop, each with the threads or replicas that suit it best."""
    for run in (digits_run(options.work), bench_run(options.work)):
        table = Table(run.name, "concurrency", "images/s", "p50 (ms)", "p99 (ms)", title="the plain loop")
        loops, servers = [], []
        for threads in (1, 2):
            with plain(run.folder, threads) as server:
                loops += load(server.url, closed(PLAIN_CONCURRENCY), options.seconds)
            row(table, f"plain loop, {threads} threads", loops[-1])
        for layout, settings in LAYOUTS.items():
            with ours(run.folder, *settings, "--fast") as server:
                servers += load(server.url, closed(PLAIN_CONCURRENCY), options.seconds)
            row(table, f"{layout}, fast", servers[-1])
        console.print(table)
        server, loop = best(servers), best(loops)
        figures |= {
            f"over_plain_loop_{run.name}": server.images_per_second / loop.images_per_second,
            f"plain_loop_{run.name}": {"server": as_json(server), "loop": as_json(loop)},
        }
        for name, one in (("server", server), ("loop", loop)):
            figures[f"plain_loop_{run.name}_{name}_p99_ms"] = as_json(one)["p99_e2el_ms"]


def sweep(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """More and more requests a second, up to twice as many as can be answered.

    Those who would wait longer than ``--queue-seconds`` are turned away, so that those let in are answered in time.
    Without that, at twice the rate, everybody waits: the last row.
    """
    run, slo = bench_run(options.work).folder, options.slo
    layout, settings = chosen(figures)
    with ours(run, *settings, "--set", f"queue_seconds={options.queue_seconds}") as server:
        most = best(load(server.url, closed(*CLOSED[:2]), options.seconds)).images_per_second
        done = load(server.url, [Load("open", most * share) for share in RATES], 2 * options.seconds, slo)
    with ours(run, *settings, "--set", "queue_samples=100000", "--set", "queue_seconds=1000") as server:
        patient = load(server.url, [Load("open", 2 * most)], 2 * options.seconds, slo)[0]
    heads = ("offered/s", "share", "done/s", f"in {slo:g} s", "p50 ms", "p99 ms", "refused", "p99 ms", "late, p99 ms")
    table = Table(*heads, title=f"open loop ({layout}); the second p99 is of those refused, late is the client")
    for share, one in [*zip(RATES, done, strict=True), (2.0, patient)]:
        values = as_json(one)
        cells = (one.load.level, share, one.requests_per_second, one.goodput, values["p50_e2el_ms"],
                 values["p99_e2el_ms"], one.rejected, one.rejection and 1e3 * one.rejection.percentiles[99],
                 one.late and 1e3 * one.late.percentiles[99])  # fmt: skip
        table.add_row(*("-" if cell is None else f"{cell:.4g}" for cell in cells))
    console.print(table)
    peak = max(one.goodput or 0.0 for one in done)
    twice = done[-1]
    figures |= {
        "goodput_at_2x": (twice.goodput or 0.0) / peak,
        "goodput_at_2x_without_refusals": (patient.goodput or 0.0) / peak,
        "goodput_peak": peak,
        "sweep_saturation": most,
        "slo_seconds": slo,
        "queue_seconds": options.queue_seconds,
        "rejection_p50_ms": twice.rejection and 1e3 * twice.rejection.percentiles[50],
        "rejection_p99_ms": twice.rejection and 1e3 * twice.rejection.percentiles[99],
        "sweep": [as_json(one) for one in done],
        "sweep_without_refusals": as_json(patient),
    }
    if options.picture is not None:
        plot(done, options.picture, f"bench, {layout}, two cores, open loop")


def kills(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Replicas of experts killed one after the other while requests come, and what of it the clients see."""
    table = Table(
        "layout", "killed", "requests", "failed", "p50 (ms)", "p99 (ms)", "max (ms)", title="killed under load"
    )
    figures["kills"] = {}
    for layout in ("colocated, 2 replicas", "pipelined"):
        settings = [*LAYOUTS["pipelined"], *TWO] if layout == "pipelined" else LAYOUTS[layout]
        with ours(digits_run(options.work).folder, *settings) as server:
            killed, stopped = [0], threading.Event()

            def kill(server: Server = server, killed: list[int] = killed, stopped: threading.Event = stopped) -> None:
                while killed[0] < KILLS and not stopped.wait(6):
                    names = ("expert-1", "expert-2") if server.replicas("expert-1") else ("experts",)
                    replicas = server.replicas(names[killed[0] % len(names)])
                    if len(replicas) > 1:  # else its successor is still starting
                        replicas[0].kill()
                        killed[0] += 1

            killer = threading.Thread(target=kill)
            killer.start()
            one = load(server.url, closed(KILL_CONCURRENCY), 12.0 * KILLS)[0]
            stopped.set()
            killer.join()
        values, latency = as_json(one), one.latency
        figures["kills"][layout] = {"killed": killed[0], "failed": one.failed + one.rejected, **values}
        table.add_row(
            layout, str(killed[0]), str(one.completed), str(one.failed + one.rejected),
            *(f"{values[key]:.1f}" for key in ("p50_e2el_ms", "p99_e2el_ms")),
            f"{1e3 * latency.max:.0f}" if latency else "-",
        )  # fmt: skip
    figures["failed_under_kills"] = sum(one["failed"] for one in figures["kills"].values())
    console.print(table)


def endurance(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Many requests, and the memory of all of the server's processes before and after."""
    first, many = ENDURANCE
    with ours(digits_run(options.work).folder) as server:

        async def request(count: int) -> None:
            async with HttpTarget(server.url, None) as target:
                await target.look()
                await closed_loop(target, MIX, KILL_CONCURRENCY, count, None, Record())

        asyncio.run(request(first))
        before = server.megabytes()
        asyncio.run(request(many // 2))
        middle = server.megabytes()
        asyncio.run(request(many - many // 2))
        after = server.megabytes()
    figures |= {"memory_mb_before": before, "memory_mb_middle": middle, "memory_mb_after": after,
                "memory_growth_mb": after - before, "memory_requests": many}  # fmt: skip


def row(table: Table, name: str, one: Statistics, images_per_second: float | None = None) -> None:
    values = as_json(one)
    p50, p99 = ("-" if values[key] is None else f"{values[key]:.1f}" for key in ("p50_e2el_ms", "p99_e2el_ms"))
    lost = f", {one.failed + one.rejected} lost" if one.failed + one.rejected else ""
    table.add_row(name + lost, f"{one.load.level:g}", f"{images_per_second or one.images_per_second:.1f}", p50, p99)


PARTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], None]] = {
    "overhead": overhead, "saturation": saturation, "teacher": teacher, "plain": plain_loops, "sweep": sweep,
    "kills": kills, "endurance": endurance,
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a closed loop (default %(default)s)")
    parser.add_argument("--slo", type=float, default=1.0, help="seconds within which an answer is good")
    parser.add_argument("--queue-seconds", type=float, default=0.7, help="the server's, in the sweep (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the sweep")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))} (one of: {', '.join(PARTS)})")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped then, too
    figures: dict[str, Any] = {}
    if options.only and options.json is not None and options.json.is_file():
        figures = json.loads(options.json.read_text(encoding="utf-8"))
    for name in names:
        PARTS[name](options, figures)
        finish("serving under load", figures, options.json)  # after each: a later part may take long


if __name__ == "__main__":
    main()
