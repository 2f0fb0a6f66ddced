"""One load after another on a target, each warmed up as it is measured."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydmd.bench.arrivals import WARMUP, Arrival, Mix, poisson
from raydmd.bench.load import Record, Target, closed_loop, open_loop
from raydmd.bench.statistics import Load, Statistics, summarize


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        loads: one after another.
        mix: the requests.
        requests: of each load; None: as many as the seconds allow, or the trace has.
        seconds: of each load; None: no limit.
        warmup: requests before each load, of its own mix and level, that do not count; None: a tenth of its requests,
            and at least two rounds of a closed loop.
        arrivals: of a trace.
        slo: seconds within which an answer is good.
        price: of an hour of the target.
    """

    loads: Sequence[Load]
    mix: Mix
    requests: int | None = None
    seconds: float | None = None
    warmup: int | None = None
    arrivals: Sequence[Arrival] = ()
    slo: float | None = None
    price: float | None = None

    def schedule(self, load: Load) -> list[Arrival]:
        """Return the arrivals of an open loop."""
        if load.kind == "trace":
            arrivals = list(self.arrivals)
        else:
            count = self.requests
            if count is None:  # five standard deviations more than are expected: none is missing at the end
                mean = load.level * (self.seconds or 0.0)
                count = math.ceil(mean + 5 * math.sqrt(mean) + 5)
            arrivals = poisson(load.level, count, self.mix.seed)
        within = [arrival for arrival in arrivals if self.seconds is None or arrival.at < self.seconds]
        return within[: self.requests] if self.requests is not None else within

    def warmups(self, load: Load) -> int:
        """Return how many requests come before a load."""
        if self.warmup is not None:
            return self.warmup
        if load.kind == "closed":
            return max(math.ceil((self.requests or 0) / 10), 2 * int(load.level))
        return max(math.ceil(len(self.schedule(load)) / 10), 2)


@dataclass
class Session:
    """Runs a plan. What was measured stays in it when it is interrupted.

    Attributes:
        target: what is loaded.
        plan: how.
        own_process: whether the pictures are made in this process, so that its CPU seconds are not the client's.
        done: the figures of each load so far.
        records: what they are of.
    """

    target: Target
    plan: Plan
    own_process: bool = False

    def __post_init__(self) -> None:
        self.done: list[Statistics] = []
        self.records: list[Record] = []

    async def run(self, say: Callable[[Load], None] = lambda load: None) -> None:
        """Run all loads; ``say`` is called as each begins."""
        for load in self.plan.loads:
            say(load)
            await self._drive(load, Record(), warmup=True)
            record, finished, began = Record(), False, time.process_time()
            try:
                await self._drive(load, record, warmup=False)
                finished = True
            finally:
                if finished or record.outcomes:
                    cpu = None if self.own_process else time.process_time() - began
                    self.records.append(record)
                    self.done.append(
                        summarize(
                            load, record, slo=self.plan.slo, cpu=cpu, price=self.plan.price, interrupted=not finished
                        )
                    )

    async def _drive(self, load: Load, record: Record, *, warmup: bool) -> None:
        plan, count = self.plan, self.plan.warmups(load)
        if load.kind == "closed":
            if warmup:
                await closed_loop(self.target, plan.mix, int(load.level), count, None, record, WARMUP)
                return
            await closed_loop(self.target, plan.mix, int(load.level), plan.requests, plan.seconds, record)
        elif not warmup:
            await open_loop(self.target, plan.mix, plan.schedule(load), record)
        elif count:
            arrivals = poisson(load.level, count, plan.mix.seed) if load.kind == "open" else plan.arrivals[:count]
            await open_loop(self.target, plan.mix, arrivals, record, WARMUP)
