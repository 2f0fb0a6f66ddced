"""From outcomes to figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raydmd.bench.load import Outcome, Record

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Load:
    """How a target is loaded.

    Attributes:
        kind: ``closed``: so many at once; ``open``: so many a second; ``trace``: at given times.
        level: the concurrency, or requests a second (of a trace: its mean).
    """

    kind: Literal["closed", "open", "trace"]
    level: float

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.level:g} at once" if self.kind == "closed" else f"{self.level:.4g}/s"


@dataclass(frozen=True)
class Spread:
    """Of some numbers: the mean, the standard deviation, percentiles by their number, the largest."""

    mean: float
    std: float
    percentiles: dict[int, float]
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Return the spread of ``values`` (percentiles are interpolated linearly); None if there are none."""
        if not len(values):
            return None
        cuts = np.percentile(values, PERCENTILES)
        return cls(
            float(np.mean(values)), float(np.std(values)), dict(zip(PERCENTILES, map(float, cuts), strict=True)),
            float(np.max(values)),
        )  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """A load's figures. Times are in seconds, rates are a second.

    Attributes:
        load: how it was loaded.
        duration: from the load's start to its last answer.
        offered: requests that were to be sent.
        completed: requests that got all their pictures.
        images: pictures that came.
        rejected: requests for which there was no room.
        failed: requests that failed in another way.
        failures: how many of each kind, rejections too.
        latency: of completed requests, from when they were to be sent.
        rejection: of rejected requests, likewise.
        late: how much later than scheduled requests were sent; the client's own fault.
        most: the most requests that were on their way at once.
        slo: seconds within which an answer is good.
        good: completed requests within ``slo``.
        stages: seconds of completed requests by stage, as the server says.
        batches: mean samples in a batch by stage, over completed requests, as the server says.
        cpu: CPU seconds of the client; None if the pictures were made in the same process.
        price: of an hour of what was loaded.
        interrupted: it was stopped before its end.
    """

    load: Load
    duration: float
    offered: int
    completed: int
    images: int
    rejected: int
    failed: int
    failures: dict[str, int]
    latency: Spread | None
    rejection: Spread | None
    late: Spread | None
    most: int
    slo: float | None
    good: int
    stages: dict[str, Spread]
    batches: dict[str, float]
    cpu: float | None = None
    price: float | None = None
    interrupted: bool = False

    @property
    def requests_per_second(self) -> float:
        """Completed requests a second."""
        return self._rate(self.completed)

    @property
    def images_per_second(self) -> float:
        """Pictures a second."""
        return self._rate(self.images)

    @property
    def goodput(self) -> float | None:
        """Completed requests within the SLO, a second."""
        return None if self.slo is None else self._rate(self.good)

    @property
    def good_share(self) -> float | None:
        """Their share of all that were sent."""
        return None if self.slo is None or not self.offered else self.good / self.offered

    @property
    def cost_per_image(self) -> float | None:
        """Price of a picture, at the rate measured."""
        if self.price is None or not self.images_per_second:
            return None
        return self.price / (3600 * self.images_per_second)

    def _rate(self, count: int) -> float:
        return count / self.duration if self.duration > 0 else 0.0


def summarize(
    load: Load, record: Record, *, slo: float | None = None, cpu: float | None = None, price: float | None = None,
    interrupted: bool = False,
) -> Statistics:  # fmt: skip
    """Return the figures of a record."""
    done = [o for o in record.outcomes if o.answer.kind == "ok"]
    refused = [o for o in record.outcomes if o.answer.kind == "rejected"]
    names = sorted({name for o in done for name in o.answer.seconds})
    stages = {name: Spread.of([o.answer.seconds[name] for o in done if name in o.answer.seconds]) for name in names}
    parts = sorted({name for o in done for name in o.answer.batches})
    return Statistics(
        load=load,
        duration=max((o.finished for o in record.outcomes), default=record.seconds),
        offered=len(record.outcomes),
        completed=len(done),
        images=sum(o.answer.pictures for o in done),
        rejected=len(refused),
        failed=len(record.outcomes) - len(done) - len(refused),
        failures=dict(Counter(o.answer.error for o in record.outcomes if o.answer.kind != "ok")),
        latency=Spread.of([o.latency for o in done]),
        rejection=Spread.of([o.latency for o in refused]),
        late=Spread.of([o.sent - o.scheduled for o in record.outcomes]),
        most=_most_at_once(record.outcomes),
        slo=slo,
        good=sum(o.latency <= slo for o in done) if slo is not None else 0,
        stages={name: spread for name, spread in stages.items() if spread is not None},
        batches={
            name: float(np.mean([o.answer.batches[name] for o in done if name in o.answer.batches])) for name in parts
        },
        cpu=cpu,
        price=price,
        interrupted=interrupted,
    )


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Return how many were on their way at most; one that ends as another begins does not overlap it."""
    ends = sorted([(o.sent, 1) for o in outcomes] + [(o.finished, -1) for o in outcomes])
    most = now = 0
    for _, change in ends:
        now += change
        most = max(most, now)
    return most
