"""Does a run that is torn at all the time end where an undisturbed one does, and how much slower is it?

The digits recipe (batch 64 in micro-batches of 16; 2 generators, 2 fakes, 2 teachers) on Ray nodes of this machine,
each with one worker, runs to its end twice: undisturbed, and while a process is killed with SIGKILL every few seconds:
of every 15 kills, in random order, four take a worker of each role and one each of the run's helpers (prompts,
manifests, pulses). A role has to be whole again for its next loss; with ``--groups`` a kill may take both workers.

    goodput        seconds of the undisturbed run over those of the disturbed one, from ``started`` to ``finished``
    max_abs_diff   the largest difference in any weight of any expert
    kills          how many; ``kills_by`` says of what, ``last_of_role`` how many left a role without a worker
    recoveries     how often the run says that it recovered; ``steps_lost`` are what it made again

    python benchmarks/chaos.py --json chaos.json       # twice --minutes, and a little
"""

import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from common import arguments, console, finish, teacher_folder
from disturb import HELPERS, ROLES, Machines, Watched, kill, seconds_of
from safetensors.torch import load_file

from raydmd.runs.folders import expert_file

DECK = (*ROLES * 4, *HELPERS)  # what 15 kills take
SHORT = 60  # iterations of the run that measures the speed


class Killer:
    """Kills something of a run every few seconds, by chance.

    Args:
        run: the run.
        every: seconds between two kills.
        groups: how likely a kill takes a whole role.
        seed: of the choices.
    """

    def __init__(self, run: Watched, every: float, groups: float, seed: int) -> None:
        self.run, self.every, self.groups, self.chance = run, every, groups, random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self._deck: list[str] = []
        self._next: tuple[str, bool, float] | None = None  # of what, all of it, which one
        self._due = 0.0

    def strike(self) -> None:
        """Kill something if it is time and the next victim is there."""
        if not self.run.lines:
            self._due = time.monotonic() + self.every
        elif time.monotonic() >= self._due and (victims := self._victims()):
            what, processes = victims
            when = kill(processes)
            self.kills.append({"time": round(when, 3), "what": what, "processes": len(processes)})
            console.print(f"{time.strftime('%H:%M:%S')} killed: {what}", highlight=False)
            self._next, self._due = None, self._due + self.every

    def _victims(self) -> tuple[str, list[psutil.Process]] | None:
        """Return who is to die; None: not there, or a role that is not whole, whose last worker it would be."""
        if self._next is None:
            if not self._deck:
                self._deck = self.chance.sample(DECK, len(DECK))
            self._next = (self._deck.pop(), self.chance.random() < self.groups, self.chance.random())
        name, whole, which = self._next
        if name in HELPERS:
            found = self.run.machines.helpers(name)
            return (name, found) if found else None
        if not self.run.whole(name):
            return None
        workers = self.run.machines.workers(name)
        return (f"{name} group", workers) if whole else (name, [workers[int(which * len(workers))]])


def run_once(machines: Machines, folder: Path, settings: list[str], options: Any = None) -> tuple[Watched, list[Any]]:
    """Run to the end, disturbed if options say how; return the run and the kills."""
    shutil.rmtree(folder, ignore_errors=True)
    run = Watched(machines, folder, settings)
    killer = None if options is None else Killer(run, options.every, options.groups, options.seed)
    try:
        end = time.monotonic() + (float("inf") if options is None else 240 * options.minutes + 300)
        while run.process.poll() is None and time.monotonic() < end:
            run.look()
            if killer is not None:
                killer.strike()
            time.sleep(0.05)
        run.look()
    finally:
        run.stop()
    return run, [] if killer is None else killer.kills


def difference(one: Path, other: Path) -> float:
    """Return the largest difference in any weight of any expert."""
    found, index = 0.0, 0
    while expert_file(one, index).is_file():
        ours, theirs = load_file(expert_file(one, index)), load_file(expert_file(other, index))
        found = max(found, *(float((ours[name] - theirs[name]).abs().max()) for name in ours))
        index += 1
    return found


def main() -> None:
    """Run twice, compare, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills (default %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="how long the undisturbed run is to take (default %(default)s)"
    )
    parser.add_argument("--iterations", type=int, help="of both runs, in place of --minutes")
    parser.add_argument(
        "--groups", type=float, default=0.0, help="how likely a kill takes a whole role (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default %(default)s)")
    options = parser.parse_args()
    settings = [f"teacher.path={teacher_folder('digits', options.work)}", "batch.micro=16"]
    calm, torn = options.work / "chaos-calm", options.work / "chaos-torn"
    machines = Machines()
    try:
        iterations = options.iterations
        if iterations is None:
            run_once(machines, calm, [*settings, f"iterations={SHORT}"])
            iterations = max(10, round(60 * options.minutes * SHORT / seconds_of(calm) / 2) * 2)
            console.print(f"{iterations} iterations", highlight=False)
        settings.append(f"iterations={iterations}")
        undisturbed, _ = run_once(machines, calm, settings)
        if undisturbed.process.returncode:
            raise RuntimeError(f"the undisturbed run failed:\n{undisturbed.log.read_text()[-3000:]}")
        run, kills = run_once(machines, torn, settings, options)
    finally:
        machines.close()
    finished = run.process.returncode == 0 and bool(run.of("finished"))
    if not finished:
        console.print(run.log.read_text()[-3000:], highlight=False, markup=False)
    recovered = run.of("recovered")
    figures = {
        "iterations": iterations,
        "every": options.every,
        "groups": options.groups,
        "seed": options.seed,
        "kills": len(kills),
        "finished": finished,
        "seconds_undisturbed": seconds_of(calm),
        "seconds_disturbed": seconds_of(torn) if finished else None,
        "goodput": seconds_of(calm) / seconds_of(torn) if finished else 0.0,
        "max_abs_diff": difference(calm, torn) if finished else None,
        "recoveries": len(recovered),
        "steps_lost": sum(event["steps_lost"] for event in recovered),
        "last_of_role": sum(event["left"] == 0 for event in run.of("worker-lost")),
        "kills_by": dict(Counter(one["what"] for one in kills)),
        "recovered_by": dict(Counter(event["how"] for event in recovered)),
        "each": kills,
    }
    finish("Chaos: a run under random kills", figures, options.json)


if __name__ == "__main__":
    main()
