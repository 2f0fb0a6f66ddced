"""How long a loss takes: seconds from a kill to the next committed step, and the steps that it takes back.

A recipe of digits (batch 64 in micro-batches of 16; 2 workers of each role) on Ray nodes of this machine, each with one
worker, while something is killed with SIGKILL, again and again, each time once the run is whole:

    replica   one of a role's two worker processes
    node      the node of one of them: its raylet and all that runs below it, at once
    group     both of a role's worker processes, at once
    driver    the driver; the same command is then run again, at once

``seconds`` goes from the kill to the first committed step that was made with the loss mended: the line of
metrics.jsonl that the run's ``recovered`` event names (for the driver, the first line that the new one writes). A step
that was on its way at the kill may be committed before, and more of them while nobody needs the one that is gone:
``seconds_any`` goes to the first line of all, ``seconds_unnoticed`` to the run's word that it is lost, and
``steps_unnoticed`` were committed meanwhile. ``seconds_reported`` is what the run says itself, from when it noticed.
``steps_lost`` are committed steps that had to be made again.

    python benchmarks/recovery.py --json recovery.json
    python benchmarks/recovery.py --recipe digits-adm --set method.adm.warmup=0 --only discriminator-replica
"""

import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from common import arguments, console, finish, teacher_folder
from disturb import Machines, Watched, kill
from rich.table import Table

from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import build_method

DEATHS = ("replica", "node", "group")
SETTLED = 5  # iterations that a whole run makes before the next kill
ENDLESS = 1_000_000


def lose(run: Watched, role: str, death: str, chance: random.Random) -> dict[str, Any]:
    """Kill workers of a role; return what it cost."""
    run.settle(SETTLED)
    machines, node = run.machines, None
    events, lines = len(run.events), len(run.lines)
    workers = machines.workers(role)
    if death == "node":
        node = chance.choice(machines.nodes[role])
        killed, when = 1, machines.vanish(node)
    elif death == "replica":
        killed, when = 1, kill([chance.choice(workers)])
    else:
        killed, when = len(workers), kill(workers)

    def recovered() -> list[dict[str, Any]]:
        return run.of("recovered", events)

    run.wait(
        f"recovered from the loss of a {role} ({death})",
        lambda: sum(len(event["workers"]) for event in recovered()) >= killed,
    )
    last, losses = recovered()[-1], run.of("worker-lost", events)
    noticed = next(event["time"] for event in losses if event["role"] == role)
    seen = next(at for at, line in reversed(run.lines) if line["iteration"] == last["iteration"])
    if node is not None:
        machines.replace(role, node)
    return {
        "seconds": seen - when,
        "seconds_any": run.lines[lines][0] - when,
        "seconds_unnoticed": noticed - when,
        "steps_unnoticed": sum(at < noticed for at, _ in run.lines[lines:]),
        "seconds_reported": sum(event["seconds"] for event in recovered()),
        "steps_lost": sum(event["steps_lost"] for event in recovered()),
        "how": last["how"],
        "lost_elsewhere": sum(event["role"] != role for event in losses),
    }


def lose_driver(run: Watched) -> dict[str, Any]:
    """Kill the driver and run its command again; return what it cost."""
    run.settle(SETTLED)
    when = run.kill()
    events, lines, committed = len(run.events), len(run.lines), run.lines[-1][1]["iteration"] + 1
    run.start()
    run.wait("a step of the driver started again", lambda: run.of("started", events) and len(run.lines) > lines)
    (started,) = run.of("started", events)
    return {
        "seconds": run.lines[lines][0] - when,
        "seconds_any": run.lines[lines][0] - when,
        "seconds_unnoticed": 0.0,
        "steps_unnoticed": 0,
        "seconds_reported": started["seconds"],
        "steps_lost": committed - started.get("resumed", 0),
        "how": "the same command again",
        "lost_elsewhere": len(run.of("worker-lost", events)),
    }


def case(role: str, death: str, kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all kills of one sort."""
    seconds = [cost["seconds"] for cost in kills]
    return {
        "role": role,
        "death": death,
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        "steps_lost_max": max(cost["steps_lost"] for cost in kills),
        "seconds_any_median": statistics.median(cost["seconds_any"] for cost in kills),
        "seconds_unnoticed_median": statistics.median(cost["seconds_unnoticed"] for cost in kills),
        "steps_unnoticed_max": max(cost["steps_unnoticed"] for cost in kills),
        "seconds_reported_median": statistics.median(cost["seconds_reported"] for cost in kills),
        "how": sorted({cost["how"] for cost in kills}),
        "lost_elsewhere": sum(cost["lost_elsewhere"] for cost in kills),
        "kills": kills,
    }


def show(cases: list[dict[str, Any]], every: int) -> None:
    """Print every case, and beside each bar the worst of the cases that it speaks of."""
    shown = (
        "seconds_median",
        "seconds_max",
        "seconds_any_median",
        "seconds_unnoticed_median",
        "seconds_reported_median",
    )
    table = Table("role", "death", "s", "max", "any", "unnoticed", "reported", "steps lost", title="Recovery")
    for one in cases:
        table.add_row(one["role"], one["death"], *(f"{one[key]:.2f}" for key in shown), str(one["steps_lost_max"]))
    console.print(table)
    bars = {
        "replica": "<= 2 s, 0 lost",
        "node": "<= 5 s, 0 lost",
        "group": f"<= 20 s, <= {every} lost",
    }
    table = Table("all roles", "s, worst median", "s, worst", "steps lost, worst", "bar")
    for death, bar in bars.items():
        found = [one for one in cases if one["death"] == death]
        table.add_row(death, *(f"{worst(found, key):.3g}" for key in WORST), bar)
    scorers = scorers_of(cases)
    table.add_row("a scorer", *(f"{worst(scorers, key):.3g}" for key in WORST), "its micro-batch only")
    console.print(table)
    console.print(f"after the loss of a scorer: {'; '.join(ways(scorers))}", highlight=False)


def scorers_of(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cases in which one scorer of two is lost."""
    return [one for one in cases if one["role"] == "teacher" and one["death"] != "group"]


def ways(cases: list[dict[str, Any]]) -> list[str]:
    """Return in what ways the run says that it recovered."""
    return sorted({how for one in cases for how in one["how"]})


WORST = ("seconds_median", "seconds_max", "steps_lost_max")


def worst(cases: list[dict[str, Any]], key: str) -> float:
    """Return the largest of a figure over cases."""
    return max((float(one[key]) for one in cases), default=float("nan"))


def main() -> None:
    """Kill all there is to kill, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=5, help="kills of each sort (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of workers (default %(default)s)")
    parser.add_argument(
        "--only", action="append", metavar="ROLE-DEATH", help="just this sort, e.g. fake-node or driver-driver"
    )
    parser.add_argument("--recipe", default="digits", help="a shipped one of digits (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args()
    roles = list(build_method(load_recipe(options.recipe)).roles)
    sorts = [(role, death) for role in roles for death in DEATHS] + [("driver", "driver")]
    sorts = [sort for sort in sorts if options.only is None or "-".join(sort) in options.only]
    teacher, chance = teacher_folder("digits", options.work), random.Random(options.seed)
    folder: Path = options.work / "recovery"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"teacher.path={teacher}", f"iterations={ENDLESS}", "batch.micro=16", *options.set]
    every = load_recipe(options.recipe, settings).checkpoint.every
    machines = Machines(roles)
    try:
        run = Watched(machines, folder, settings, options.recipe)
        try:
            run.settle(4 * SETTLED)
            usual = statistics.median(line["seconds"] for _, line in run.lines)
            kills: dict[tuple[str, str], list[dict[str, Any]]] = {sort: [] for sort in sorts}
            for _ in range(options.times):
                for role, death in sorts:
                    cost = lose_driver(run) if role == "driver" else lose(run, role, death, chance)
                    kills[role, death].append(cost)
                    told = f"{cost['seconds']:.2f} s, {cost['steps_lost']} steps lost, {cost['how']}"
                    console.print(f"{time.strftime('%H:%M:%S')} {role} {death}: {told}", highlight=False)
        finally:
            run.stop()
    finally:
        machines.close()
    cases = [case(role, death, kills[role, death]) for role, death in sorts]
    show(cases, every)
    figures: dict[str, Any] = {"times": options.times, "iteration_seconds": usual, "manifest_every": every}
    figures["scorer_how"] = "; ".join(ways(scorers_of(cases)))
    for death in (*DEATHS, "driver"):
        for key in WORST if any(one["death"] == death for one in cases) else ():
            figures[f"{death}_{key}"] = worst([one for one in cases if one["death"] == death], key)
    finish("Recovery: the worst role", {**figures, "cases": cases}, options.json)


if __name__ == "__main__":
    main()
