"""How well the scorer pool keeps workers of unequal speed busy: work done a second over the sum of their speeds.

Real actors whose scoring sleeps for a calibrated time; messages of the digits recipe's shapes at a batch of 4096 cut
into 64 micro-batches. The pool does not know the speeds when it starts.

    efficiency_uneven       workers of speed 1, 1 and 3: median over batches of 64 micro-batches after the first
    efficiency_even_cut     the same with a third of each batch for every worker
    efficiency_known_cut    the same with the best parts for the true speeds: what Ray's own calls leave to be had
    efficiency_by_workers   1 to 8 workers of equal speed, 8 micro-batches each
    uneven                  efficiency by micro-batches a batch: the first batch, and the median of the others

    python benchmarks/scoring_balance.py --json scoring_balance.json
"""

import raydmd.runtime  # noqa: F401  # has Ray keep to loopback, which it decides when it is imported

# isort: split
import asyncio
import statistics
import time
from collections import Counter
from functools import partial
from typing import Any

import ray
import torch
from common import arguments, finish

from raydmd.config.recipe import Recipe
from raydmd.methods.loading import load_recipe
from raydmd.runtime.membership.role_workers import WorkerHandle
from raydmd.runtime.workers.base import BESIDE, FrozenWorker
from raydmd.runtime.workers.shares import counts_by_speed, even_counts
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.wire import to_wire
from raydmd.training.messages import BatchId, Noised, Score

SAMPLES = 64  # a micro-batch
UNEVEN = (1.0, 1.0, 3.0)
Inputs = list[tuple[Any, ...]]


class Sleeper:
    """A teacher's part whose scoring sleeps for some seconds."""

    def __init__(self, recipe: Recipe, device: str, seconds: float) -> None:
        self.seconds = seconds

    def score(self, proposal: Noised) -> Score:
        time.sleep(self.seconds)
        return Score(proposal.batch_id, proposal.x_t)


def start(recipe: Recipe, seconds: list[float]) -> list[WorkerHandle]:
    """Start a worker for each of these seconds a micro-batch."""
    remote: Any = ray.remote
    kind = remote(concurrency_groups={BESIDE: 1}, num_cpus=0)(FrozenWorker)
    actors = [
        kind.remote("teacher", recipe, n, 1, "cpu", partial(Sleeper, seconds=each)) for n, each in enumerate(seconds)
    ]
    identities = ray.get([actor.ready.remote() for actor in actors])
    return [
        WorkerHandle("teacher", n, actor, found)
        for n, (actor, found) in enumerate(zip(actors, identities, strict=True))
    ]


def stop(members: list[WorkerHandle]) -> None:
    """End workers."""
    for member in members:
        ray.kill(member.actor)


def proposals(count: int) -> Inputs:
    """Return references to micro-batches of digits, as the generator gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs: Inputs = []
    for n in range(count):
        x_t = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
        t = torch.full((SAMPLES,), 0.7, dtype=torch.float64)
        labels = {"label": torch.randint(0, 10, (SAMPLES,), generator=generator)}
        inputs.append((ray.put(to_wire(Noised(BatchId(0, 0, n * SAMPLES, 0), x_t, t, labels))),))
    return inputs


async def by_pool(pool: ScorerPool, inputs: Inputs) -> Counter[int]:
    """Score a batch with the pool; return who made how many."""
    call = await pool.map("score", inputs)
    return Counter(stats.worker for stats in await asyncio.gather(*call.call_stats))


async def by_cut(members: list[WorkerHandle], counts: list[int], inputs: Inputs) -> Counter[int]:
    """Score a batch of which every worker gets a fixed part at once."""
    order = sorted((piece / count, n) for n, count in enumerate(counts) for piece in range(count))
    call_stats = []
    for (_, n), each in zip(order, inputs, strict=True):
        _, stats = members[n].actor.call.options(num_returns=2).remote("score", *each)
        call_stats.append(stats)
    return Counter(stats.worker for stats in await asyncio.gather(*call_stats))


async def efficiencies(score: Any, speed: float, count: int, batches: int) -> tuple[list[float], Counter[int]]:
    """Return each batch's efficiency, for workers that make ``speed`` micro-batches a second, and the last shares."""
    found = []
    for _ in range(batches):
        inputs = proposals(count)
        since = time.perf_counter()
        shares = await score(inputs)
        found.append(count / (time.perf_counter() - since) / speed)
        await asyncio.sleep(0.3)  # what somebody may still hold of the last batch is not this one's
    return found, shares


async def uneven(recipe: Recipe, options: Any) -> dict[str, Any]:
    """Measure workers of speeds 1, 1 and 3, for each size of batch with a pool that knows nothing yet."""
    seconds = [options.seconds / speed for speed in UNEVEN]
    speed = sum(1 / each for each in seconds)
    members = start(recipe, seconds)
    figures: dict[str, Any] = {"uneven": {}}
    for count in (16, 32, 64):
        pool = ScorerPool(3)
        for member in members:
            pool.add(member)
        result, shares = await efficiencies(partial(by_pool, pool), speed, count, options.batches)
        figures["uneven"][str(count)] = {
            "first": result[0], "median": statistics.median(result[1:]), "range": [min(result[1:]), max(result[1:])],
            "shares": [shares[n] for n in range(len(members))],
        }  # fmt: skip
        figures[f"efficiency_uneven_{count}"] = figures["uneven"][str(count)]["median"]
    figures["efficiency_uneven"] = figures["efficiency_uneven_64"]
    cuts = {"even": even_counts(64, len(members)), "known": counts_by_speed(64, UNEVEN)}
    for name, counts in cuts.items():
        result, _ = await efficiencies(partial(by_cut, members, counts), speed, 64, options.batches)
        figures[f"efficiency_{name}_cut"] = statistics.median(result)
    stop(members)
    return figures


async def by_workers(recipe: Recipe, options: Any) -> dict[str, float]:
    """Measure 1 to 8 workers of equal speed."""
    members = start(recipe, [options.seconds] * 8)
    figures = {}
    for workers in range(1, 9):
        pool = ScorerPool(3)
        for member in members[:workers]:
            pool.add(member)
        speed = workers / options.seconds
        result, _ = await efficiencies(partial(by_pool, pool), speed, 8 * workers, options.batches)
        figures[str(workers)] = statistics.median(result[1:])
    stop(members)
    return figures


async def measure(recipe: Recipe, options: Any) -> dict[str, Any]:
    """Measure all."""
    figures = await uneven(recipe, options)
    return {**figures, "efficiency_by_workers": await by_workers(recipe, options)}


def main() -> None:
    """Measure all, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, default=6, help="batches of each kind (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=0.06, help="a slow worker's for a micro-batch (default %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    figures = asyncio.run(measure(load_recipe("digits"), options))
    ray.shutdown()
    settings = {"batches": options.batches, "ms_a_micro_batch": [1e3 * options.seconds / speed for speed in UNEVEN]}
    figures["efficiency_equal_least"] = min(figures["efficiency_by_workers"].values())
    finish("Scoring balance", {**settings, **figures}, options.json)


if __name__ == "__main__":
    main()
