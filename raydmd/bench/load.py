"""The two ways to load a server: so many at once (closed loop), or at set times come what may (open loop)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from raydmd.bench.arrivals import MEASURED, Arrival, Mix, Request


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        kind: ``ok``; ``rejected``: there was no room for it (429, 503); ``failed``: anything else.
        error: the kind of failure, as ``HTTP 500``, ``timeout`` or ``ServerDisconnectedError``.
        pictures: how many came.
        seconds: by stage, as the server says.
        batches: by stage, samples in the batch, as the server says.
        why: what the server said of a failure.
    """

    kind: Literal["ok", "rejected", "failed"]
    error: str = ""
    pictures: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    batches: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


class Target(Protocol):
    """What is measured."""

    async def ask(self, request: Request) -> Answer:
        """Send a request and wait for its answer; what goes wrong is told, not raised."""


@dataclass(frozen=True)
class Outcome:
    """A request, its answer, and its times in seconds from the load's start.

    Attributes:
        request: what was asked.
        answer: what became of it.
        scheduled: when it should have been sent; in the closed loop, when it was.
        sent: when it was.
        finished: when its answer was there.
    """

    request: Request
    answer: Answer
    scheduled: float
    sent: float
    finished: float

    @property
    def latency(self) -> float:
        """Seconds from when it was to be sent: what waits in the client counts, too."""
        return self.finished - self.scheduled


@dataclass
class Record:
    """A load as far as it has come: what is finished, and the seconds since it began."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0


async def closed_loop(
    target: Target, mix: Mix, concurrency: int, count: int | None, seconds: float | None, record: Record,
    stream: int = MEASURED,
) -> None:  # fmt: skip
    """Keep ``concurrency`` requests on their way until ``count`` were sent or ``seconds`` are over.

    Args:
        target: what is loaded.
        mix: the requests.
        concurrency: senders; each waits for its answer before it sends the next.
        count: of requests; None: as many as the seconds allow.
        seconds: after which no more are sent; None: no limit.
        record: filled as answers come, so that what was measured outlives an interruption.
        stream: of the mix.
    """
    clock = asyncio.get_running_loop().time
    began, sent = clock(), 0

    async def sender() -> None:
        nonlocal sent
        while (count is None or sent < count) and (seconds is None or clock() - began < seconds):
            number, sent = sent, sent + 1
            request = mix.request(number, stream)
            at = clock() - began
            answer = await target.ask(request)
            record.outcomes.append(Outcome(request, answer, at, at, clock() - began))

    try:
        async with asyncio.TaskGroup() as senders:
            for _ in range(concurrency):
                senders.create_task(sender())
    finally:
        record.seconds = clock() - began


async def open_loop(
    target: Target, mix: Mix, arrivals: Sequence[Arrival], record: Record, stream: int = MEASURED
) -> None:
    """Send each request at its time, whatever became of those before, and wait for all answers.

    Args:
        target: what is loaded.
        mix: the requests, where the arrivals do not say otherwise.
        arrivals: in order.
        record: filled as answers come.
        stream: of the mix.
    """
    clock = asyncio.get_running_loop().time
    requests = [replace(mix.request(i, stream), **arrival.asks) for i, arrival in enumerate(arrivals)]
    began = clock()

    async def send(request: Request, scheduled: float) -> None:
        sent = clock() - began
        answer = await target.ask(request)
        record.outcomes.append(Outcome(request, answer, scheduled, sent, clock() - began))

    try:
        async with asyncio.TaskGroup() as group:
            for request, arrival in zip(requests, arrivals, strict=True):
                if (wait := arrival.at - (clock() - began)) > 0:
                    await asyncio.sleep(wait)
                group.create_task(send(request, arrival.at))
    finally:
        record.seconds = clock() - began
