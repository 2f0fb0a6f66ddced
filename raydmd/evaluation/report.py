"""`raydmd report`: runs side by side on one page that needs nothing but itself: no network, no script."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from raydmd.atomic import write_text
from raydmd.config.recipe import dump_recipe
from raydmd.errors import UserError
from raydmd.evaluation.comparison import by_teacher, differences
from raydmd.evaluation.curves import Band, Line, chart
from raydmd.evaluation.evaluate import Figures, evaluation_of
from raydmd.evaluation.exhibits import EXPERTS, ON_THE_WAY, Exhibits, Picture, picture_file
from raydmd.evaluation.validation_prompts import preview_words
from raydmd.runs.run import Run
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations

RUNS = ("#2f6fde", "#df6420", "#1c9a66", "#c0399b", "#a88412", "#6f7b8a")
ROLES = {"teacher": "#8b5cf6", "fake": "#e58a1f", "generator": "#0d9f9a"}
OTHER_ROLES = ("#c0399b", "#2f6fde", "#6f7b8a", "#a88412")  # of methods with more
CURVES = {
    "loss_fake": "Fake score's loss",
    "loss_discriminator": "Discriminator's loss",
    "loss_classifier": "Loss of the classifier on the fake score",
    "loss_latent": "Latent discriminator's loss",
    "loss_pixel": "Pixel discriminator's loss",
    "generator_grad_norm": "Generator's gradient norm",
    "dm_gradient": "Distribution-matching gradient, mean |g|",
    "gradient": "Gradient of the objective by the samples, mean |g|",
    "x_s_mean": "Mean of the generator's samples x_s",
    "x_s_std": "Spread of the generator's samples x_s",
    "seconds": "Seconds an iteration",
}
FIGURES = {  # name: (heading, what is best, what it is)
    "boundary_fd": ("FD to teacher", "low", "Frechet distance to the teacher's samples of x_s completed by it"),
    "boundary_sw": ("SW of x_s", "low", "sliced Wasserstein distance of x_s to the data diffused to s"),
    "x_s_variance_ratio": ("variance ratio", "one", "variance of x_s over that of the truth at s; 1 is right"),
    "fd_teacher": ("FD to teacher", "low", "Frechet distance to the teacher's many-step samples in the features of a "
                   "small classifier (64 is the real digits' whole variance); the teacher's own row is the floor"),
    "fd_data": ("FD to data", "", "Frechet distance to the real digits; guidance takes the teacher away from them"),
    "accuracy": ("accuracy", "high", "share that the classifier takes for the digit that was asked"),
    "pcos": ("cosine in class", "teacher", "mean cosine of two pictures of a class, centred; less is more diverse"),
    "variance": ("variance in class", "teacher", "variance in a class over the 64 pixels; more is more diverse"),
    "modes": ("modes", "high", "modes found, of 8"),
    "mode_tv": ("mode TV", "low", "total variation between the samples' shares of the modes and the true ones"),
    "within_3_sigma": ("in 3 sigma", "high", "share within 3 standard deviations of a mode; the data's is .989"),
    "spread": ("spread", "one", "standard deviation around the nearest mode over the data's"),
    "sliced_wasserstein": ("SW to data", "low", "sliced Wasserstein distance to the data"),
    "sw_teacher": ("SW to teacher", "low", "sliced Wasserstein distance to the teacher's many-step samples"),
    "not_finite": ("diverged", "", "share of samples that are no numbers"),
}  # fmt: skip
QUIET = ("checkpoint",)


def report(runs: Sequence[Run], out: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write one HTML page on one or more runs, whole or not at all; return its path.

    A run that has not been evaluated, or not since its experts changed, is evaluated first. Runs on one teacher, by
    its weights' fingerprint, share their pictures of it. A run that is still in training shows what it has, and where
    something is missing (a teacher that has moved, say) the page says so in its place.

    Args:
        runs: to be shown side by side.
        out: the page's file.
        progress: told in words what is being done.

    Raises:
        UserError: no runs, or ``out`` is a folder.
        StorageError: the disk is full or gone.
    """
    if not runs:
        raise UserError("report: name at least one run's folder")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; name the page's file, e.g. {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work of minutes: it may not be possible
    say = progress or (lambda words: None)
    names = _distinct_names(runs)
    shown = [_run(run, names[i], RUNS[i % len(RUNS)], say) for i, run in enumerate(runs)]
    sections = [_section([shown[i] for i in numbers], say) for numbers in by_teacher(runs)]
    page = _template().render(
        runs=shown,
        sections=sections,
        curves=_curves(shown),
        differences=differences(runs) if len(runs) > 1 else None,
        on_the_way=ON_THE_WAY,
        title=" · ".join(names),
        when=time.strftime("%Y-%m-%d %H:%M"),
        figure_words={name: words for name, (_, _, words) in FIGURES.items()},
    )
    write_text(out, page)
    return out


def _run(run: Run, name: str, color: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Gather what the page says of one run by itself."""
    note, figures = "", {}
    try:
        say(f"evaluating {name}")
        figures = evaluation_of(run, say)
    except UserError as error:
        note = str(error)
    recipe, metrics = run.recipe, run.metrics()
    total, done = sum(plan_iterations(recipe, run.phases)), len(metrics)
    steps = sum(phase.steps for phase in run.phases)
    facts = {
        "method": f"{recipe.method.name}, {_count(steps, 'step')} in {_count(len(run.phases), 'phase')}",
        "iterations": f"{done} of {total}" if done < total else f"{total}",
        "batch": f"{recipe.batch.size}",
        "rates": f"generator {recipe.optimizer.generator.lr:g}, fake {recipe.optimizer.fake.lr:g}",
        "experts": "full" if recipe.method.experts.kind == "full" else f"LoRA, rank {recipe.method.experts.rank}",
        "training": _duration(sum(line["seconds"] for line in metrics)) if metrics else "no record",
    }
    return {
        "run": run, "name": name, "color": color, "figures": figures, "note": note, "metrics": metrics, "facts": facts,
        "headline": _headline(figures), "events": _events(run), "recipe": dump_recipe(recipe),
        "utilisation": _utilisation(metrics), "previews": (previews := _previews(run)),
        "preview_prompts": preview_words(recipe, run.family, recipe.monitor.samples) if previews else [],
        "pixels": run.family.name == "digits",
        "bands": _bands(run.phases, metrics),
    }  # fmt: skip


def _section(shown: list[dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """Gather pictures and tables of the runs on one teacher."""
    say("drawing pictures")
    first: Run = shown[0]["run"]
    teacher = first.recipe.teacher
    section: dict[str, Any] = {
        "family": teacher.family,
        "words": f"{teacher.family}, guidance {teacher.guidance_scale:g}, Heun in {_count(teacher.steps, 'step')}",
        "pixels": first.family.name == "digits",
        "table": _table(shown),
        "boundaries": _boundary_table(shown),
        "panels": [], "paths": [], "note": "", "prompts": [],
    }  # fmt: skip
    exhibits: Exhibits | None = None
    for one in shown:  # of one teacher: whichever run still has it
        try:
            exhibits = Exhibits(one["run"])
            break
        except UserError as error:
            section["note"] = section["note"] or str(error)
    if exhibits is None:
        return section
    section["note"], section["prompts"] = "", exhibits.prompts
    few = sorted({sum(phase.steps for phase in one["run"].phases) for one in shown})
    section["points"] = exhibits.points
    section["panels"] = exhibits.teacher_panels(few)
    for one in shown:
        one["bands"] = _bands(one["run"].phases, one["metrics"], exhibits)
        try:
            made = exhibits.student(one["run"])
        except UserError:
            continue  # no trained expert: the run's own part of the page says so
        panel = exhibits.student_panel(one["run"], made, one["color"])
        section["panels"].append(panel)
        phases = one["run"].trained_phases()
        ends = [
            {"phase": phase.index + 1, "pictures": exhibits.boundary(phase, made, k)}
            for k, phase in enumerate(phases)
            if phase.end > 0
        ]
        legend = [
            {"name": f"expert {p.index + 1}", "color": EXPERTS[p.index % len(EXPERTS)], "span": _span(p)}
            for p in phases
        ]
        section["paths"].append({**one, "path": exhibits.path(made), "ends": ends, "legend": legend})
    return section


def _table(shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of figures: data, teacher, teacher in few steps, students."""
    common: dict[str, Figures] = {}
    for one in shown:
        for key, value in one["figures"].items():
            if key in ("data", "teacher") or key.startswith("teacher_euler_"):
                common.setdefault(key, value)
    euler = sorted((key for key in common if "euler" in key), key=lambda key: int(key.rsplit("_", 1)[-1]))
    order = [key for key in ("data", "teacher", *euler) if key in common]
    rows = [(_teacher_words(key, shown[0]["run"].recipe.teacher.steps), "", common[key]) for key in order]
    rows += [(one["name"], one["color"], one["figures"]["student"]) for one in shown if "student" in one["figures"]]
    return _rows(rows, common.get("teacher", {}))


def _boundary_table(shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of the figures at each phase's boundary."""
    rows = []
    teacher: Figures = {}
    for one in shown:
        teacher = teacher or one["figures"].get("teacher", {})
        for entry in one["figures"].get("boundaries", []):
            figures = {key: value for key, value in entry.items() if key not in ("phase", "s")}
            rows.append((f"{one['name']}, phase {entry['phase']}, s = {entry['s']:.3g}", one["color"], figures))
    return _rows(rows, teacher)


def _rows(rows: list[tuple[str, str, Figures]], teacher: Figures) -> dict[str, Any]:
    names = [name for name in FIGURES if any(name in figures for _, _, figures in rows)]
    students = [figures for _, color, figures in rows if color]
    best = {name: _best(name, students, teacher) for name in names} if len(students) > 1 else {}
    cells = [
        {
            "name": name,
            "color": color,
            "cells": [
                {"text": _figure(figures.get(key)), "best": bool(color) and figures.get(key) == best.get(key, math.nan)}
                for key in names
            ],
        }
        for name, color, figures in rows
    ]
    return {"heads": [(name, *FIGURES[name]) for name in names], "rows": cells}


def _best(name: str, students: list[Figures], teacher: Figures) -> float | None:
    values = [float(figures[name]) for figures in students if name in figures]
    aim = FIGURES[name][1]
    if not values or len(set(values)) < 2 or not aim or (aim == "teacher" and name not in teacher):
        return None
    distance: dict[str, Callable[[float], float]] = {
        "low": lambda value: value,
        "high": lambda value: -value,
        "one": lambda value: abs(value - 1),
        "teacher": lambda value: abs(value - teacher[name]),
    }
    return min(values, key=distance[aim])


def _curves(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the training curves of all runs, with the phases shaded where they are the same for all."""
    recorded = [one for one in shown if one["metrics"]]
    spans = {tuple((band.start, band.end, band.name) for band in one["bands"]["plain"]) for one in recorded}
    charts = []

    def breaks(one: dict[str, Any]) -> list[float]:
        return [band.start for band in one["bands"]["plain"]]

    found = {key for one in recorded for line in one["metrics"] for key in line if key.startswith("loss_")}
    titles = CURVES | {key: f"Loss: {key.removeprefix('loss_')}" for key in sorted(found - CURVES.keys())}
    for key, title in titles.items():
        lines = [
            Line(one["name"], one["color"], [m["iteration"] + 1 for m in kept], [m[key] for m in kept], breaks(one))
            for one in shown
            if (kept := [m for m in one["metrics"] if isinstance(m.get(key), int | float)])
        ]
        bands = []
        if len(spans) == 1 and lines:
            bands = recorded[0]["bands"]["guided" if key == "x_s_std" else "plain"]
        if svg := chart(title, lines, bands):
            note = "dashed: the teacher's samples there" if any(band.guide is not None for band in bands) else ""
            charts.append({"title": title, "svg": Markup(svg), "note": note})
    return charts


def _bands(
    phases: list[Phase], metrics: list[dict[str, Any]], exhibits: Exhibits | None = None
) -> dict[str, list[Band]]:
    """Return the iterations of each phase as bands, and the same with the truth's spread as a level."""
    plain, guided = [], []
    for phase in phases:
        inside = [line["iteration"] + 1 for line in metrics if line["phase"] == phase.index + 1]
        if inside:
            color = EXPERTS[phase.index % len(EXPERTS)]
            band = (min(inside) - 0.5, max(inside) + 0.5, f"phase {phase.index + 1}", color)
            plain.append(Band(*band))
            guided.append(Band(*band, exhibits.truth_spread(phase) if exhibits else None))
    return {"plain": plain, "guided": guided}


def _utilisation(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return charts of each role's busy share, and of its workers where their number changes."""
    lines, workers = [], []
    others = sorted({role for line in metrics for role in line.get("roles", {})} - ROLES.keys())
    for role, color in (ROLES | dict(zip(others, cycle(OTHER_ROLES), strict=False))).items():
        kept = [m for m in metrics if role in m.get("roles", {}) and m.get("seconds")]
        at = [m["iteration"] + 1 for m in kept]
        of = [m["roles"][role] for m in kept]
        whole = [m["seconds"] * max(r["workers"], 1) for r, m in zip(of, kept, strict=True)]
        busy = [min(1.0, r["busy_seconds"] / seconds) for r, seconds in zip(of, whole, strict=True)]
        lines.append(Line(role, color, at, busy))
        workers.append(Line(role, color, at, [float(r["workers"]) for r in of]))
    charts = {"Busy share of each role": chart("Busy share of each role", lines, percent=True)}
    if any(len(set(line.y)) > 1 for line in workers):
        charts["Workers of each role"] = chart("Workers of each role", workers)
    legend = [{"name": line.name, "color": line.color} for line in lines if line.x]
    return [{"title": title, "svg": Markup(svg), "legend": legend} for title, svg in charts.items() if svg]


def _events(run: Run) -> dict[str, Any]:
    """Return a run's events as rows; checkpoints are counted."""
    events = run.events()
    start = events[0].get("time", 0.0) if events else 0.0
    rows = [
        {
            "at": _duration(float(event.get("time", start)) - start),
            "kind": str(event.get("event", "")),
            "facts": ", ".join(f"{key} {_fact(value)}" for key, value in event.items() if key not in ("time", "event")),
        }
        for event in events
        if event.get("event") not in QUIET
    ]
    checkpoints = [event for event in events if event.get("event") == "checkpoint"]
    words = _count(len(checkpoints), "checkpoint") if checkpoints else ""
    if checkpoints and "iteration" in checkpoints[-1]:
        words += f", the last at iteration {checkpoints[-1]['iteration']}"
    return {"rows": rows[-40:], "left_out": max(0, len(rows) - 40), "checkpoints": words}


def _previews(run: Run, most: int = 4) -> list[Picture]:
    """Return a few of the grids that were drawn in training, evenly over it, the last one included."""
    files = sorted((run.folder / "samples").glob("student-*.png"))
    if len(files) > most:
        files = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    pictures = []
    for file in files:
        number = file.stem.rsplit("-", 1)[-1]
        title = f"iteration {int(number)}" if number.isdigit() else file.stem
        with Image.open(file) as image:
            image.load()
            pictures.append(picture_file(image, title, f"the student's samples at {title}, in training"))
    return pictures


def _headline(figures: Figures) -> dict[str, str]:
    """Return the one figure that a card shows large, with the floor under it."""
    for key in ("fd_teacher", "sw_teacher"):
        if key in figures.get("student", {}):
            value, floor = figures["student"][key], figures.get("teacher", {}).get(key)
            return {"value": _figure(value), "name": FIGURES[key][0], "floor": _figure(floor)}
    return {}


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names; where two are the same, with their parent folder."""
    names = [run.name for run in runs]
    return [
        str(Path(*run.folder.resolve().parts[-2:])) if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def _teacher_words(key: str, steps: int) -> str:
    if "euler" in key:
        return f"teacher, Euler {key.rsplit('_', 1)[-1]}"
    return f"teacher, Heun {steps}" if key == "teacher" else key


def _span(phase: Phase) -> str:
    return " → ".join(f"{t:.3g}" for t in phase.times)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(seconds, 0.0), 60)
    if not minutes:
        return f"{rest:.1f} s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02.0f} s"


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}:{_fact(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(value: Any) -> str:
    """Return a figure as the tables show it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
