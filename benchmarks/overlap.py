"""Seconds an iteration: Ray against the schedule's critical path, and against the sequential reference.

Three measurements on the digits recipe at batch 256:

    over_critical_path      Ray with roles that sleep for as long as the real ones work, over the critical path of the
                            dependency graph of those sleeps: what the runtime itself costs
    wall_over_measured_path Ray with the real roles over the critical path of its own calls, as each was measured: what
                            is lost beside the work, with three busy processes on the machine's cores
    speedup_over_reference  the sequential reference over Ray with the real roles of one thread each; the reference on
                            one thread (_1) and on two (_2)
    reference_over_bare     the sequential reference over a loop written by hand (bare_loop.py), batch 64 and 256

Every ratio is the median over rounds in which both sides run in turn.

    python benchmarks/overlap.py --json overlap.json
"""

import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from bare_loop import bare_loop
from common import arguments, finish, open_recipe
from rich.console import Console

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import Key
from raydmd.jsonl import read_lines
from raydmd.methods.local import train
from raydmd.methods.registry import plan_phases
from raydmd.runtime import launch
from raydmd.runtime.launch import distill
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.workers.base import CallStats
from raydmd.sampling.phase import Phase
from raydmd.sampling.plan import plan_iterations
from raydmd.sampling.student import exit_step
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import BatchId, Noised, PromptBatch, Samples, Score, UpdateStats
from raydmd.training.teacher import Scorer

Costs = dict[str, float]  # seconds of a call; a rollout's per network call
QUIET = Console(quiet=True)


def calibrate(recipe: Recipe, family: Any, teacher: Any, prompts: Any, repeats: int = 9) -> Costs:
    """Time each role's real work on one thread, the median of some repeats."""
    size = recipe.batch.size
    phases = plan_phases(recipe, family.schedule.t_max)
    given = recipe, family, teacher, phases
    generator, fake, scorer = Generator(*given), Fake(*given), Scorer(*given)
    generator.start_phase(0, 0)
    fake.start_phase(0, 0)
    batch = PromptBatch(0, size, family.conditions(prompts.rows(0, size)))
    costs: dict[str, list[float]] = {key: [] for key in ("call", "propose", "fake", "fake_score", "teacher", "update")}

    def timed(key: str, work: Any, calls: int = 1) -> Any:
        since = time.perf_counter()
        result = work()
        costs[key].append((time.perf_counter() - since) / calls)
        return result

    for n in range(repeats):
        leave = exit_step(generator.phase, Key(recipe.seed, 0, "exit", n * generator.draws))
        samples = timed("call", partial(generator.rollout, n, 0, batch), leave)
        timed("fake", partial(fake.update, [samples]))
        proposal = generator.propose(n, batch)
        real = timed("teacher", partial(scorer.score, proposal))
        generated = timed("fake_score", partial(fake.score, proposal))
        timed("update", partial(generator.update, [real], [generated]))
    costs["propose"] = [0.0]
    return {key: statistics.median(values) for key, values in costs.items()}


def trained_calls(recipe: Recipe, phase: Phase, draw: int) -> int:
    """Return the network calls of a rollout inside the phase in training: up to its exit step."""
    return exit_step(phase, Key(recipe.seed, phase.index, "exit", draw))


def frozen_calls(phases: list[Phase], phase: Phase) -> int:
    """Return the network calls of a rollout in earlier phases."""
    return sum(other.steps for other in phases[: phase.index])


def critical_path(recipe: Recipe, costs: Costs) -> float:
    """Return the seconds of all iterations if messages took no time: each role works through its calls in order."""
    phases, updates = plan_phases(recipe), recipe.method.fake_updates
    generator = fake = teacher = 0.0
    n = 0
    for phase, length in zip(phases, plan_iterations(recipe, phases), strict=True):
        frozen = costs["call"] * frozen_calls(phases, phase)
        for i in range(length):
            late = frozen if i == 0 else 0.0  # a phase's first rollouts find nothing prepared
            for u in range(updates):
                generator += late + costs["call"] * trained_calls(recipe, phase, n * (updates + 1) + u)
                fake = max(fake, generator) + costs["fake"]
            generator += late + costs["call"] * trained_calls(recipe, phase, n * (updates + 1) + updates)
            teacher = max(teacher, generator) + costs["teacher"]
            fake = max(fake, generator) + costs["fake_score"]
            if i + 1 < length:
                generator += frozen * (updates + 1)
            generator = max(generator, teacher, fake) + costs["update"]
            n += 1
    return generator


def measured_path(calls: list[list[CallStats]]) -> float:
    """Return the seconds of all iterations if messages took no time and each call took as long as it did.

    Args:
        calls: the calls of each iteration, of one worker a role.
    """
    generator = fake = teacher = 0.0
    for made in calls:
        spent: dict[tuple[str, str], list[float]] = {}
        for stats in made:
            spent.setdefault((stats.role, stats.call), []).append(stats.busy_seconds)
        for rollout, update in zip(spent["generator", "rollout"], spent["fake", "update"], strict=True):
            generator += rollout
            fake = max(fake, generator) + update
        generator += sum(spent["generator", "propose"])
        teacher = max(teacher, generator) + sum(spent["teacher", "score"])
        fake = max(fake, generator) + sum(spent["fake", "score"])
        generator += sum(spent.get(("generator", "prepare"), []))
        generator = max(generator, teacher, fake) + sum(spent["generator", "update"])
    return generator


class Watched(Recorder):
    """A recorder that keeps the statistics of every call."""

    calls: ClassVar[list[list[CallStats]]] = []

    def iteration(self, phase: int, iteration: int, call_stats: list[CallStats], *more: Any) -> dict[str, Any]:
        self.calls.append(call_stats)
        return super().iteration(phase, iteration, call_stats, *more)


class _Weightless:
    """What a sleeping role has to save."""

    def state(self, index: int = 0) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros(1)}

    def metadata(self) -> dict[str, str]:
        return {}


class Sleeper:
    """A role whose work is to sleep; its messages have the real shapes."""

    def __init__(self, recipe: Recipe, device: str, costs: Costs) -> None:
        self.recipe, self.costs, self.phases, self.experts = recipe, costs, plan_phases(recipe), _Weightless()
        self.draws = recipe.method.fake_updates + 1
        self.x = torch.zeros(recipe.batch.size, 1, 8, 8)
        self.updates = 0
        self.prepared: set[int] = set()

    def start_phase(self, index: int, updates: int) -> None:
        self.phase = self.phases[index]

    def end_phase(self) -> dict[str, torch.Tensor]:
        return self.experts.state()

    def state(self) -> dict[str, torch.Tensor]:
        return self.experts.state()

    def prepare(self, iteration: int, *prompts: PromptBatch) -> None:
        self.prepared.update(iteration * self.draws + update for update in range(len(prompts)))
        time.sleep(len(prompts) * self.costs["call"] * frozen_calls(self.phases, self.phase))

    def rollout(self, iteration: int, update: int, prompts: PromptBatch) -> Samples:
        batch_id = BatchId(self.phase.index, iteration * self.draws + update, prompts.start, self.updates)
        frozen = 0 if batch_id.draw in self.prepared else frozen_calls(self.phases, self.phase)
        time.sleep(self.costs["call"] * (frozen + trained_calls(self.recipe, self.phase, batch_id.draw)))
        return Samples(batch_id, self.x, prompts.conditions)

    def propose(self, iteration: int, prompts: PromptBatch) -> Noised:
        samples = self.rollout(iteration, self.draws - 1, prompts)
        return Noised(samples.batch_id, self.x, torch.zeros(prompts.count, dtype=torch.float64), prompts.conditions)


class SleepingGenerator(Sleeper):
    def update(self, teacher: list[Score], fake: list[Score], collective: Any) -> UpdateStats:
        time.sleep(self.costs["update"])
        self.updates += 1
        return UpdateStats(0.0, [(0, dict.fromkeys(Generator.figures, 0.0))], self.updates)


class SleepingFake(Sleeper):
    def update(self, batches: list[Samples], collective: Any) -> UpdateStats:
        time.sleep(self.costs["fake"])
        self.updates += 1
        return UpdateStats(0.0, [(0, dict.fromkeys(Fake.figures, 0.0))], self.updates)

    def score(self, proposal: Noised) -> Score:
        time.sleep(self.costs["fake_score"])
        return Score(proposal.batch_id, self.x)


class SleepingScorer(Sleeper):
    def score(self, proposal: Noised) -> Score:
        time.sleep(self.costs["teacher"])
        return Score(proposal.batch_id, self.x)


def on_ray(recipe: Recipe, folder: Path, parts: Any = None) -> list[float]:
    """Return the seconds of each iteration on Ray."""
    shutil.rmtree(folder, ignore_errors=True)
    Watched.calls.clear()
    distill(recipe, folder, console=QUIET, parts=parts)
    return [line["seconds"] for line in read_lines(folder / "metrics.jsonl")]


def sequential(recipe: Recipe, family: Any, prompts: Any, threads: int) -> list[float]:
    """Return the seconds of each iteration of the reference trainer."""
    torch.set_num_threads(threads)
    marks = [time.perf_counter()]
    train(recipe, family, family.load_teacher(), prompts, lambda *_: marks.append(time.perf_counter()))
    torch.set_num_threads(1)
    return [later - earlier for earlier, later in zip(marks[:-1], marks[1:], strict=True)]


def settled(seconds: list[float], recipe: Recipe, skip: int = 3) -> float:
    """Return the mean seconds of an iteration, the first few of each phase left out; exit steps make them uneven."""
    lengths, at, kept = plan_iterations(recipe, plan_phases(recipe)), 0, []
    for length in lengths:
        kept += seconds[at + skip : at + length]
        at += length
    return statistics.mean(kept)


def main() -> None:
    """Measure all, print, write."""
    launch.Recorder = Watched  # type: ignore[misc]
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each comparison (default %(default)s)")
    parser.add_argument("--iterations", type=int, default=40, help="iterations of a run (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = [f"iterations={options.iterations}", "monitor.samples_every=0", "monitor.tensorboard=false"]
    settings += ["checkpoint.every=1000", "batch.micro=null"]
    recipe, family, teacher, prompts = open_recipe("digits", options.work, *settings, "batch.size=256")
    small = open_recipe("digits", options.work, *settings, "batch.size=64")[0]
    folder = options.work / "overlap"
    figures: dict[str, Any] = {"iterations": options.iterations, "rounds": options.rounds}

    costs = calibrate(recipe, family, teacher, prompts)
    figures["costs_ms"] = {key: 1e3 * value for key, value in costs.items()}
    parts = {
        "generator": partial(SleepingGenerator, costs=costs),
        "fake": partial(SleepingFake, costs=costs),
        "teacher": partial(SleepingScorer, costs=costs),
    }
    path = critical_path(recipe, costs) / options.iterations
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {"critical_path": [path]}
    for _ in range(options.rounds):
        asleep = statistics.mean(on_ray(recipe, folder, parts)[1:])
        awake = on_ray(recipe, folder)
        ratios.setdefault("wall_over_measured_path", []).append(sum(awake[1:]) / measured_path(Watched.calls[1:]))
        ray, one, two = (
            settled(result, recipe)
            for result in (awake, sequential(recipe, family, prompts, 1), sequential(recipe, family, prompts, 2))
        )
        ratios.setdefault("over_critical_path", []).append(asleep / path)
        ratios.setdefault("speedup_over_reference_1", []).append(one / ray)
        ratios.setdefault("speedup_over_reference_2", []).append(two / ray)
        for key, value in {"ray_asleep": asleep, "ray": ray, "reference_1": one, "reference_2": two}.items():
            seconds.setdefault(key, []).append(value)
        labels = family.conditions(prompts.rows(0, len(prompts)))["label"]
        for name, of in (("64", small), ("256", recipe)):
            bare = settled(bare_loop(of, family, family.load_teacher(), labels), of)
            ours = settled(sequential(of, family, prompts, 1), of)
            ratios.setdefault(f"reference_over_bare_{name}", []).append(ours / bare)
            seconds.setdefault(f"bare_{name}", []).append(bare)
    for key, values in ratios.items():
        figures[key] = statistics.median(values)
        figures[f"{key}_range"] = [min(values), max(values)]
    figures["reference_over_bare"] = max(figures["reference_over_bare_64"], figures["reference_over_bare_256"])
    for key, values in seconds.items():
        figures[f"ms_{key}"] = 1e3 * statistics.median(values)
    finish("Overlap: seconds an iteration", figures, options.json)


if __name__ == "__main__":
    main()
