"""Every method on two small data sets, over several seeds: how near it comes to its teacher, and to x_s half way.

The ring is unequal and off-centre, so that a wrong target at a phase's boundary shows; the digits have classes, and
guidance. Rows beside the recipes' own `phased` (2 phases of 2 steps):

    boundary, boundary-naive   ring: the first phase of `phased-4x1` alone (one step, 1 to .75), and its control
    phased-naive               the control: x_s taken for x_0 in the fake score's target
    truth-0.75, truth-0.5      true x_s in place of a student's: the floor of every figure at a boundary
    teacher, teacher_euler_N   its many-step sampler from other noise (the floor), and its own few steps

Figures are those of `raydmd evaluate`; boundary_* are of the first boundary's x_s, completed by the teacher's ODE where
they are not of x_s itself. Every seed has a distillation, a reference and noises of its own; the teacher is one. Spread
is the standard deviation over seeds. `seconds` are CPU seconds of the training, on one thread.

A finished cell (data, method, seed) is kept in the work folder under a hash of its recipe, its teacher and the
package's source; a second run takes it from there.

    python benchmarks/small_quality.py --seeds 3 --json small_quality.json
    python benchmarks/small_quality.py --data digits --only phased teacher --seeds 1
"""

import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import arguments, console, finish, open_recipe, teacher_folder
from rich.table import Table

import raydmd
from raydmd.config.recipe import dump_recipe
from raydmd.diffusion.random import Key, normal
from raydmd.evaluation.evaluate import (
    Figures,
    Reference,
    RingJudge,
    complete,
    evaluate_student,
    evaluate_teacher,
    make_reference,
    teacher_samples,
)
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.methods.registry import plan_phases
from raydmd.training.teacher import Scorer

DATA = ("ring", "digits")
TEACHER = "teacher"


@dataclass(frozen=True)
class Row:
    """What a row changes in the data set's shipped recipe.

    Attributes:
        overrides: ``key.path=value`` each.
        data: the data sets that it is for.
        phases: how many phases are trained; None: all.
    """

    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = DATA
    phases: int | None = None


LORA = ("method.experts.kind=lora", "method.experts.rank=8", "method.experts.alpha=8")
BOUNDARY = ("method.phases=4", "iterations=[300, 1, 1, 1]")
ROWS = {
    "phased": Row(),
    "phased-lora": Row(LORA),
    "phased-4x1": Row(("method.phases=4",)),
    "phased-disjoint": Row(("method.score_interval=disjoint",)),
    "phased-renoise": Row(("method.solver=renoise",)),
    "phased-naive": Row(("method.fake_target=naive",)),
    "dmd-fewstep": Row(("method.name=dmd-fewstep",)),
    "dmd-sgts": Row(("method.name=dmd-sgts",)),
    "dmd": Row(("method.name=dmd",)),
    "dmd-regression": Row(("method.name=dmd", "method.regression.weight=0.25")),  # DMD's weight
    "dmd2": Row(("method.name=dmd2",)),
    "tdm": Row(("method.name=tdm",)),
    "tdm-subinterval": Row(("method.name=tdm", "method.fake_target=subinterval")),
    "sid": Row(("method.name=sid",)),
    "adm": Row(("method.name=adm", "method.adm.warmup=300"), ("ring",)),
    "adm-digits": Row(("method.name=adm", "method.adm.warmup=100"), ("digits",)),
    "adm-cold": Row(("method.name=adm",)),
    "adp": Row(("method.name=adp", "iterations=600")),
    "dmdx": Row(("method.name=dmdx", "iterations=1200", "method.adp.iterations=600"), ("ring",)),
    "dmdx-digits": Row(("method.name=dmdx", "iterations=1000", "method.adp.iterations=600"), ("digits",)),
    "boundary-sid": Row((*BOUNDARY, "method.name=sid"), ("ring",), 1),
    "boundary-sid-naive": Row((*BOUNDARY, "method.name=sid", "method.fake_target=naive"), ("ring",), 1),
    "boundary-adm": Row((*BOUNDARY, "method.name=adm"), ("ring",), 1),
    "boundary-adm-naive": Row((*BOUNDARY, "method.name=adm", "method.fake_target=naive"), ("ring",), 1),
    "boundary": Row(BOUNDARY, ("ring",), 1),
    "boundary-naive": Row((*BOUNDARY, "method.fake_target=naive"), ("ring",), 1),
    TEACHER: Row(),
}
FLOORS = {"truth-0.75": 4, "truth-0.5": 2}  # row: phases of `phased` whose first boundary it is

COLUMNS = {
    "digits": ("fd_teacher", "pcos", "variance", "accuracy", "boundary_fd", "x_s_variance_ratio", "seconds"),
    "ring": (
        "modes", "mode_tv", "within_3_sigma", "spread", "sliced_wasserstein",
        "boundary_sw", "boundary_mode_tv", "x_s_variance_ratio", "seconds",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training and its figures (or the teacher's rows) of one seed."""

    data: str
    method: str
    seed: int
    work: Path

    def settings(self) -> list[str]:
        """Return what is changed in the data set's recipe."""
        return [f"seed={self.seed}", *ROWS[self.method].overrides]

    @property
    def file(self) -> Path:
        """Return where its figures are kept."""
        weights = (teacher_folder(self.data, self.work) / "model.safetensors").read_bytes()
        recipe = dump_recipe(load_recipe(self.data, self.settings()))
        text = f"{recipe}{self.method}{hashlib.blake2b(weights).hexdigest()}{source()}"
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return self.work / "small_quality" / f"{self.data}-{self.method}-{self.seed}-{name}.json"


@functools.cache
def source() -> str:
    """Return a hash of the package's version and of all its source that a figure depends on."""
    root = Path(raydmd.__file__).parent
    parts = ("config", "data", "diffusion", "evaluation", "methods", "models", "objectives", "sampling", "training")
    drawn = {"report.py", "exhibits.py", "pictures.py", "curves.py"}  # of the evaluation, what only shows figures
    files = [file for name in parts for file in (root / name).rglob("*.py") if file.name not in drawn]
    digest = hashlib.blake2b(raydmd.__version__.encode(), digest_size=16)
    for file in sorted(files):
        digest.update(file.read_bytes())
    for function in (measure, student_rows, teacher_rows, floor):
        digest.update(inspect.getsource(function).encode())
    return digest.hexdigest()


def measure(cell: Cell) -> dict[str, Figures]:
    """Return the figures of a cell by row, from its file if it is there."""
    if cell.file.is_file():
        return dict(json.loads(cell.file.read_text(encoding="utf-8")))
    rows = teacher_rows(cell) if cell.method == TEACHER else {cell.method: student_rows(cell)}
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    written = cell.file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    written.replace(cell.file)
    return rows


@functools.lru_cache(maxsize=4)
def reference(data: str, seed: int, work: Path) -> Reference:
    """Return what the students of a data set's teacher are measured against; a process makes it once."""
    recipe, family, teacher, _ = open_recipe(data, work, f"seed={seed}")
    return make_reference(recipe, family, teacher, cache=work)


def student_rows(cell: Cell) -> Figures:
    """Train a student by the sequential trainer and measure it."""
    recipe, family, teacher, prompts = open_recipe(cell.data, cell.work, *cell.settings())
    phases = plan_phases(recipe, family.schedule.t_max)[: ROWS[cell.method].phases]
    stop = sum(recipe.iterations[: len(phases)]) if isinstance(recipe.iterations, list) else None
    since, wall = time.process_time(), time.perf_counter()
    try:
        run = train(recipe, family, teacher, prompts, iterations=stop)
    except FloatingPointError:
        return {"diverged": 1.0}
    figures: Figures = {"seconds": time.process_time() - since, "wall_seconds": time.perf_counter() - wall}
    experts = run.parts["generator"].experts
    found = evaluate_student(recipe, family, teacher, experts, phases, reference(cell.data, cell.seed, cell.work))
    figures |= found.get("student", {})
    for entry in found["boundaries"][:1]:
        figures |= at_boundary(entry)
    figures["boundaries"] = found["boundaries"]
    return figures


def at_boundary(entry: Figures) -> Figures:
    """Return a boundary's figures under names of their own."""
    kept = ("x_s_variance_ratio", "boundary_fd", "boundary_sw")
    return {key if key in kept else f"boundary_{key}": value for key, value in entry.items() if key not in ("phase",)}


def teacher_rows(cell: Cell) -> dict[str, Figures]:
    """Measure the teacher's own samplers, the data, and true x_s in a student's place."""
    recipe, family, teacher, _ = open_recipe(cell.data, cell.work, *cell.settings())
    known = reference(cell.data, cell.seed, cell.work)
    rows: dict[str, Figures] = evaluate_teacher(recipe, family, teacher, known)
    for name, phases in FLOORS.items():
        rows[name] = floor(cell, phases, known)
    return rows


def floor(cell: Cell, phases: int, known: Reference) -> Figures:
    """Measure true samples at the first boundary of that many phases as if a student had made them."""
    recipe, family, teacher, _ = open_recipe(cell.data, cell.work, *cell.settings(), f"method.phases={phases}")
    scorer, phase = Scorer(recipe, family, teacher), plan_phases(recipe, family.schedule.t_max)[0]
    if isinstance(known.judge, RingJudge):
        clean = known.judge.fresh
    else:
        clean = teacher_samples(scorer, known.conditions, len(known), "floor", seed=known.seed, batch=known.batch)
    noise = normal(Key(known.seed, 0, "benchmark/floor", phases), 0, len(clean), family.latent_shape)
    x_s = family.schedule.diffuse(clean, noise, phase.end)
    completed = complete(scorer, x_s, known.conditions, start=phase.end, batch=known.batch)
    return at_boundary(known.judge.boundary(x_s, known.truth(family, phase), completed))


def measure_all(cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Figures]]]:
    """Yield cells and their rows as they finish, ``jobs`` at a time, each in a process with one torch thread."""
    if jobs == 1:
        yield from ((cell, measure(cell)) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(measure, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def summarise(seeds: list[Figures]) -> dict[str, Any]:
    """Return mean, spread and the seeds' values of each scalar figure, and the seeds' boundaries as they are."""
    names = dict.fromkeys(name for each in seeds for name, value in each.items() if isinstance(value, int | float))
    result: dict[str, Any] = {}
    for name in names:
        values = [float(figures[name]) for figures in seeds if name in figures]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        result[name] = {"mean": statistics.fmean(values), "spread": spread, "seeds": values}
    if any(figures.get("boundaries") for figures in seeds):
        result["boundaries"] = [figures.get("boundaries", []) for figures in seeds]
    return result


def table(data: str, rows: dict[str, dict[str, Any]], seeds: int) -> Table:
    """Return a data set's rows as a table of mean +- spread."""
    result = Table("method", *COLUMNS[data], title=f"{data}, {seeds} seeds, mean +- spread")
    for name, row in rows.items():
        cells = (f"{row[key]['mean']:.3f} +- {row[key]['spread']:.3f}" if key in row else "-" for key in COLUMNS[data])
        result.add_row(name, *cells)
    return result


def flat(rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Return the figures that have a bar, or are part of one, under names of their own."""

    def value(data: str, row: str, name: str, take: Callable[[list[float]], float] = statistics.fmean) -> float:
        found = rows.get(data, {}).get(row, {}).get(name)
        return take(found["seeds"]) if found else math.nan

    figures = {
        "ring_boundary_sw": value("ring", "boundary", "boundary_sw"),
        "ring_boundary_tv": value("ring", "boundary", "boundary_mode_tv"),
        "ring_boundary_sw_naive": value("ring", "boundary-naive", "boundary_sw"),
        "ring_boundary_tv_naive": value("ring", "boundary-naive", "boundary_mode_tv"),
        "ring_boundary_sw_floor": value("ring", "truth-0.75", "boundary_sw"),
        "ring_boundary_tv_floor": value("ring", "truth-0.75", "boundary_mode_tv"),
        "digits_phased_fd_teacher": value("digits", "phased", "fd_teacher"),
        "digits_phased_fd_worst": value("digits", "phased", "fd_teacher", max),
        "digits_teacher_fd_floor": value("digits", TEACHER, "fd_teacher"),
        "digits_teacher_euler_4_fd": value("digits", "teacher_euler_4", "fd_teacher"),
        "digits_teacher_euler_4_fd_best": value("digits", "teacher_euler_4", "fd_teacher", min),
        "digits_phased_boundary_fd": value("digits", "phased", "boundary_fd"),
        "digits_phased_naive_boundary_fd": value("digits", "phased-naive", "boundary_fd"),
        "digits_phased_variance_ratio": value("digits", "phased", "x_s_variance_ratio"),
        "digits_phased_pcos": value("digits", "phased", "pcos"),
        "digits_teacher_pcos": value("digits", TEACHER, "pcos"),
    }
    return {name: figure for name, figure in figures.items() if not math.isnan(figure)}


Bar = tuple[str, tuple[str, ...], Callable[..., bool]]
BARS: list[Bar] = [
    ("ring, x_s at .75: sliced Wasserstein <= .06", ("ring_boundary_sw",), lambda sw: sw <= 0.06),
    ("ring, x_s at .75 completed: mode-weight TV <= .06", ("ring_boundary_tv",), lambda tv: tv <= 0.06),
    ("ring, the naive target's sliced Wasserstein > .3", ("ring_boundary_sw_naive",), lambda sw: sw > 0.3),
    ("ring, the naive target's TV > .3", ("ring_boundary_tv_naive",), lambda tv: tv > 0.3),
    ("digits, phased: mean FD to the teacher <= .45", ("digits_phased_fd_teacher",), lambda fd: fd <= 0.45),
    (
        "digits, phased: every seed below the teacher's 4-step Euler",
        ("digits_phased_fd_worst", "digits_teacher_euler_4_fd_best"),
        lambda worst, euler: worst < euler,
    ),
    ("digits, phased: FD at the boundary <= .40", ("digits_phased_boundary_fd",), lambda fd: fd <= 0.40),
    ("digits, phased: x_s variance ratio in .9 .. 1.2", ("digits_phased_variance_ratio",), lambda r: 0.9 <= r <= 1.2),
    (
        "digits, phased: pcos within .05 of the many-step teacher's",
        ("digits_phased_pcos", "digits_teacher_pcos"),
        lambda student, teacher: abs(student - teacher) <= 0.05,
    ),
]


def judge(figures: dict[str, float]) -> dict[str, bool]:
    """Print each bar whose figures are there as met or not, and return the same by the bar's words."""
    result = {}
    for words, names, holds in BARS:
        if all(name in figures for name in names):
            result[words] = bool(holds(*(figures[name] for name in names)))
            values = ", ".join(f"{figures[name]:.3f}" for name in names)
            console.print(f"{'met    ' if result[words] else 'NOT MET'}  {words}: {values}", highlight=False)
    return result


def main() -> None:
    """Measure every cell that is not there yet, and print."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="METHOD", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--data", choices=[*DATA, "both"], default="both", help="default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work, chosen = options.work.resolve(), list(options.only or ROWS)
    sets = [data for data in DATA if options.data in (data, "both")]
    for data in sets:
        open_recipe(data, work)  # trains the teacher and writes the prompts, once
    plan = [(data, m, seed) for seed in range(options.seeds) for data in sets for m in chosen if data in ROWS[m].data]
    cells = [Cell(data, method, seed, work) for data, method, seed in plan]
    done: dict[Cell, dict[str, Figures]] = {}
    for cell, found in measure_all(cells, options.jobs):
        done[cell] = found
        console.print(f"{len(done)}/{len(cells)}  {cell.data} {cell.method} seed {cell.seed}", highlight=False)
    rows: dict[str, dict[str, dict[str, Any]]] = {data: {} for data in sets}
    for data in sets:
        ours = [done[cell] for cell in cells if cell.data == data]
        for name in dict.fromkeys(name for found in ours for name in found):
            rows[data][name] = summarise([found[name] for found in ours if name in found])
        console.print(table(data, rows[data], options.seeds))
    figures = flat(rows)
    bars = judge(figures)
    finish("Small data sets", {"seeds": options.seeds, **figures, "bars": bars, **rows}, options.json)


if __name__ == "__main__":
    main()
