"""A request's way through the stages: in parcels, again from the start when a replica is lost on the way."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from raydmd.errors import PortableError
from raydmd.serving.admission import Admission
from raydmd.serving.card import Offer, experts_of, read_offer
from raydmd.serving.contract import (
    Ask,
    BadAsk,
    Card,
    Made,
    Maker,
    Size,
    Step,
    Unavailable,
    no_negative_prompt,
)
from raydmd.serving.settings import Serving
from raydmd.serving.stage import KEPT, Glimpse, NoRevision, Parcel, Piece

T = TypeVar("T")

TRIES = 8
PAUSE = 0.1  # seconds before a second try; each next one waits twice as long, up to a second


class Lost(PortableError):
    """A stage's replica died, or what it held did: the samples can be made anew."""


class Link(Protocol):
    """A stage, wherever it is. A call raises `Lost` where another replica might answer."""

    async def run(self, parcel: Parcel) -> Piece:
        """Do as `Stage.run`."""

    def watch(self, parcel: Parcel) -> AsyncGenerator[Glimpse | Piece, None]:
        """Do as `Stage.watch`."""

    async def preview(self, parcel: Parcel) -> tuple[bytes, ...]:
        """Do as `Stage.preview`."""

    async def offers(self, served: str) -> list[Offer]:
        """Do as `Stage.offers`."""

    async def ready(self) -> None:
        """Return as soon as it answers."""


def stages_of(serving: Serving, experts: int) -> dict[str, tuple[str, ...]]:
    """Return the student's stages in order, by name, and the parts of each."""
    parts = [f"expert-{k + 1}" for k in range(experts)]
    before = ("encode",) if serving.encoder == "inline" else ()
    after = ("decode",) if serving.decoder == "inline" else ()
    stages: dict[str, tuple[str, ...]] = {}
    if serving.encoder == "own":
        stages["encoder"] = ("encode",)
    if serving.layout == "colocated":
        stages["experts"] = (*before, *parts, *after)
    else:
        for part in parts:
            stages[part] = (part,)
        stages[parts[0]] = (*before, *stages[parts[0]])
        stages[parts[-1]] = (*stages[parts[-1]], *after)
    if serving.decoder == "own":
        stages["decoder"] = ("decode",)
    return stages


TEACHER_PARTS = ("encode", "teacher", "decode")


class Pipeline:
    """The `contract.Backend` over stages.

    Args:
        serving: the settings.
        links: the stages by name, as `stages_of` names them, and ``teacher`` if it is served.
    """

    def __init__(self, serving: Serving, links: Mapping[str, Link], offer: Offer | None = None) -> None:
        self.links = links
        limits = (serving.queue_samples, serving.queue_seconds, serving.api_replicas == 1)
        self.admissions: dict[Maker, Admission] = {
            maker: Admission(*limits, maker)
            for maker in ("student", "teacher")  # neither waits in the other's queue
        }
        self.serving = serving
        self._use(offer or read_offer(serving))

    def _use(self, offer: Offer) -> None:
        self._offer, self._card = offer, offer.card
        self._chain = list(stages_of(self.serving, experts_of(offer.card)))
        self._revisions = [offer.card.revision]

    async def refresh(self) -> str:
        """Serve the newest weights that all stages hold; return their revision.

        Where none are held by all, the ones of before stay. The run's folder is not read: whatever comes of it, what
        is told is what the stages have. A stage of several replicas is asked through one of them; requests that come
        to another which is behind are made by the weights of before, or wait for it.

        Raises:
            Lost: a stage does not answer.
        """
        before = self._offer
        held = await _all([link.offers(before.card.revision) for link in self.links.values()])
        by_all = [{offer.card.revision for offer in offers} for offers in held]
        common = [offer for offer in held[0] if all(offer.card.revision in some for some in by_all)]
        if common and common[-1].card.revision != before.card.revision:
            newest, revisions = common[-1], self._revisions
            self._use(newest)
            if newest.terms == before.terms:
                others = [revision for revision in by_all[0] if revision != newest.card.revision]
                # in place: requests on their way may go over to them
                revisions[:] = list(dict.fromkeys([newest.card.revision, before.card.revision, *others]))[:KEPT]
                self._revisions = revisions
        return self._card.revision

    def card(self) -> Card:
        """Say what is served now."""
        return self._card

    def queued(self) -> int:
        """Return how many samples are asked for and not made yet."""
        return sum(admission.inside for admission in self.admissions.values())

    async def ready(self) -> None:
        """Return once each stage has answered; see `contract.Backend.ready`."""
        try:
            await _all([link.ready() for link in self.links.values()])
        except Lost:
            raise Unavailable("a replica that makes pictures was lost") from None

    async def make(self, ask: Ask) -> Made:
        """Make pictures; see `contract.Backend.make`."""
        parcels = self._parcels(ask)
        with self.admissions[ask.maker].admitted(ask.samples):
            return _joined(await _all([self._travel(self._names(ask), parcel) for parcel in parcels]))

    async def watch(self, ask: Ask) -> AsyncGenerator[Step | Made, None]:
        """Make pictures and say each step; see `contract.Backend.watch`."""
        parcels = self._parcels(ask)
        gathered: dict[int, dict[int, Step]] = {}
        seen: asyncio.Queue[Step | None] = asyncio.Queue()

        def say(number: int, step: Step) -> None:
            """Say a step once all parcels have made it."""
            rows = gathered.setdefault(step.number, {})
            rows[number] = step
            if len(rows) == len(parcels):
                pictures = tuple(picture for i in sorted(rows) for picture in rows[i].pictures)
                seen.put_nowait(replace(step, pictures=pictures, seconds=max(s.seconds for s in rows.values())))

        async def all_of_them() -> Made:
            try:
                return _joined(
                    await _all([self._travel(self._names(ask), p, partial(say, i)) for i, p in enumerate(parcels)])
                )
            finally:
                seen.put_nowait(None)

        with self.admissions[ask.maker].admitted(ask.samples):
            whole = asyncio.create_task(all_of_them())
            try:
                while (step := await seen.get()) is not None:
                    yield step
                yield await whole
            finally:
                whole.cancel()

    def _names(self, ask: Ask) -> list[str]:
        return ["teacher"] if ask.maker == "teacher" else self._chain

    def _parcels(self, ask: Ask) -> list[Parcel]:
        """Cut a request into parcels that fit in a batch.

        Raises:
            BadAsk: a size that is not served, a teacher that is not loaded.
        """
        card = self._card
        if ask.maker == "teacher" and card.teacher_steps is None:
            raise BadAsk("the teacher is not served here (start the server with --teacher)", "model")
        size: Size = ask.size or card.sizes[0]
        if size not in card.sizes:
            allowed = ", ".join(f"{width}x{height}" for width, height in card.sizes)
            raise BadAsk(f"size {size[0]}x{size[1]} is not served here (one of: {allowed})", "size")
        if (ask.output_format == "mp4") != (card.kind == "video"):
            raise BadAsk(f"'{card.name}' makes {card.kind}s: {ask.output_format} is no format of theirs",
                         "output_format")  # fmt: skip
        if ask.negative_prompt is not None and not card.negative_prompts:
            raise BadAsk(no_negative_prompt(card), "negative_prompt")
        shape, most = self._offer.shapes[card.sizes.index(size)], self.serving.max_batch
        return [
            Parcel(
                self._revisions[0], prompt, ask.seed, start, min(most, ask.n - start), shape, size, ask.output_format,
                ask.previews, partial_images=ask.partial_images, compression=ask.compression,
                negative_prompt=ask.negative_prompt, steps=ask.steps, guidance_scale=ask.guidance_scale,
                model=card.names(ask.maker)[0],
            )
            for prompt in ask.prompts
            for start in range(0, ask.n, most)
        ]  # fmt: skip

    async def _travel(
        self, names: list[str], parcel: Parcel, say: Callable[[Step], None] | None = None
    ) -> tuple[Piece, float]:
        """Take a parcel through the stages; return the last one's piece, with all seconds, and the seconds in all.

        Raises:
            Unavailable: replicas were lost again and again, or do not load the weights.
        """
        began, said, misses = time.perf_counter(), 0, 0
        alike = self._revisions if parcel.revision in self._revisions else [parcel.revision]
        revisions = list(alike)
        revision = revisions[0]

        def once(step: Step) -> None:
            """Say a step that was not said before the replica was lost; by other weights, all are said anew."""
            nonlocal said
            if say is not None and step.number > said:
                said = step.number
                say(step)

        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(min(1.0, PAUSE * 2 ** (attempt - 1)))
            try:
                piece = await self._pass(names, replace(parcel, revision=revision), once if say else None)
                return piece, time.perf_counter() - began
            except NoRevision:
                misses += 1
                with suppress(Exception):  # this replica may have been started with what the stages do not hold
                    await self.refresh()
                revisions = list(dict.fromkeys([*revisions, *alike]))
                another = revisions[misses % len(revisions)]
                revision, said = another, said if another == revision else 0
            except Lost:
                continue  # made again by the same weights
        why = "have not loaded the weights yet" if misses else "were lost again and again"
        raise Unavailable(f"the replicas that make pictures {why}; try again later")

    async def _pass(self, names: list[str], parcel: Parcel, say: Callable[[Step], None] | None) -> Piece:
        """Go through the stages once."""
        seconds: dict[str, float] = {}
        batches: dict[str, int] = {}
        piece = Piece(parcel)
        for name in names:
            if say is None or name in ("encoder", "decoder"):
                piece = await self.links[name].run(piece.parcel)
            else:
                piece = await self._watched(name, names[-1], piece.parcel, say)
            for part, took in piece.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + took
            batches |= piece.batches
        return replace(piece, seconds=seconds, batches=batches)

    async def _watched(self, name: str, last: str, parcel: Parcel, say: Callable[[Step], None]) -> Piece:
        async with aclosing(self.links[name].watch(parcel)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    return event
                step = event.step
                if event.latents is not None:
                    shown = replace(parcel, conditions=None, latents=event.latents)
                    pictures = await self.links[last].preview(shown)
                    step = replace(step, pictures=pictures)
                say(step)
        raise Lost(name)


async def _all(ways: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first error ends the others and is raised."""
    if len(ways) == 1:
        return [await ways[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(way) for way in ways]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _joined(results: list[tuple[Piece, float]]) -> Made:
    """Put the parcels' pieces together: seconds of the slowest, the largest batch."""
    files = tuple(file for piece, _ in results for file in piece.files)
    seconds = {part: max(piece.seconds[part] for piece, _ in results) for part in results[0][0].seconds}
    seconds["total"] = max(took for _, took in results)
    batches = {part: max(piece.batches[part] for piece, _ in results) for part in results[0][0].batches}
    parcels = [piece.parcel for piece, _ in results]
    tokens = tuple(parcel.text_tokens for parcel in parcels if parcel.start == 0)  # once a prompt
    return Made(files, seconds, batches, parcels[0].revision, tokens, math.prod(parcels[0].shape[1:]))
