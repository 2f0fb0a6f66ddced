"""A request's way through the stages: in batches, again from the start when a replica is lost on the way."""

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
    BadRequest,
    Card,
    GenerationRequest,
    GenerationResult,
    Maker,
    Size,
    Step,
    Unavailable,
    needs_first_frame,
    no_first_frame,
    no_negative_prompt,
)
from raydmd.serving.known_prompts import check_prompt
from raydmd.serving.settings import Serving
from raydmd.serving.stage import KEPT, NoRevision, Piece, StageBatch, StepPreview

T = TypeVar("T")

TRIES = 8
PAUSE = 0.1  # seconds before a second try; each next one waits twice as long, up to a second


class Lost(PortableError):
    """A stage's replica died, or what it held did: the samples can be made anew."""


class Link(Protocol):
    """A stage, wherever it is. A call raises `Lost` where another replica might answer."""

    async def run(self, stage_batch: StageBatch) -> Piece:
        """Do as `Stage.run`."""

    def watch(self, stage_batch: StageBatch) -> AsyncGenerator[StepPreview | Piece, None]:
        """Do as `Stage.watch`."""

    async def preview(self, stage_batch: StageBatch) -> tuple[bytes, ...]:
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

    async def check(self, request: GenerationRequest) -> None:
        """Refuse what is known to be wrong; see `contract.Backend.check`."""
        self._stage_batches(request)
        if request.first_frame is None and isinstance(self._offer.texts, str):  # a table's: others are not looked up
            for prompt in request.prompts:
                await asyncio.to_thread(check_prompt, self._offer, prompt)

    async def make(self, request: GenerationRequest) -> GenerationResult:
        """Make pictures; see `contract.Backend.make`."""
        stage_batches = self._stage_batches(request)
        with self.admissions[request.maker].admitted(request.samples):
            return _joined(
                await _all([self._travel(self._names(request), stage_batch) for stage_batch in stage_batches])
            )

    async def watch(self, request: GenerationRequest) -> AsyncGenerator[Step | GenerationResult, None]:
        """Make pictures and say each step; see `contract.Backend.watch`."""
        stage_batches = self._stage_batches(request)
        gathered: dict[int, dict[int, Step]] = {}
        seen: asyncio.Queue[Step | None] = asyncio.Queue()

        def say(number: int, step: Step) -> None:
            """Say a step once all stage batches have made it."""
            rows = gathered.setdefault(step.number, {})
            rows[number] = step
            if len(rows) == len(stage_batches):
                pictures = tuple(picture for i in sorted(rows) for picture in rows[i].pictures)
                seen.put_nowait(replace(step, pictures=pictures, seconds=max(s.seconds for s in rows.values())))

        async def all_of_them() -> GenerationResult:
            try:
                return _joined(
                    await _all(
                        [self._travel(self._names(request), p, partial(say, i)) for i, p in enumerate(stage_batches)]
                    )
                )
            finally:
                seen.put_nowait(None)

        with self.admissions[request.maker].admitted(request.samples):
            whole = asyncio.create_task(all_of_them())
            try:
                while (step := await seen.get()) is not None:
                    yield step
                yield await whole
            finally:
                whole.cancel()

    def _names(self, request: GenerationRequest) -> list[str]:
        return ["teacher"] if request.maker == "teacher" else self._chain

    def _stage_batches(self, request: GenerationRequest) -> list[StageBatch]:
        """Cut a request into batches that a network takes at once.

        Raises:
            BadRequest: a size that is not served, a teacher that is not loaded, a first frame that is not taken.
        """
        card = self._card
        if request.maker == "teacher" and card.teacher_steps is None:
            raise BadRequest("the teacher is not served here (start the server with --teacher)", "model")
        size: Size = request.size or card.sizes[0]
        if size not in card.sizes:
            allowed = ", ".join(f"{width}x{height}" for width, height in card.sizes)
            raise BadRequest(f"size {size[0]}x{size[1]} is not served here (one of: {allowed})", "size")
        if (request.output_format == "mp4") != (card.kind == "video"):
            raise BadRequest(f"'{card.name}' makes {card.kind}s: {request.output_format} is no format of theirs",
                         "output_format")  # fmt: skip
        if request.negative_prompt is not None and not card.negative_prompts:
            raise BadRequest(no_negative_prompt(card), "negative_prompt")
        if request.guidance_scale not in (None, 1.0) and not card.null_prompt:
            raise BadRequest(f"guidance_scale: '{card.name}' has no null prompt here (teacher.options.null_prompt), so "
                             f"only 1 is possible", "guidance_scale")  # fmt: skip
        if request.first_frame is None and card.first_frame == "required":
            raise BadRequest(needs_first_frame(card), "input_reference")
        if request.first_frame is not None and card.first_frame == "none":
            raise BadRequest(no_first_frame(card), "input_reference")
        if request.first_frame is not None and len(request.first_frame) != 3 * size[0] * size[1]:
            raise BadRequest(f"input_reference: its pixels are not those of {size[0]}x{size[1]}", "input_reference")
        shape, most = self._offer.shapes[card.sizes.index(size)], self.serving.max_batch
        return [
            StageBatch(
                self._revisions[0], prompt, request.seed, start, min(most, request.n - start), shape, size,
                request.output_format, request.previews, partial_images=request.partial_images,
                compression=request.compression, negative_prompt=request.negative_prompt, steps=request.steps,
                guidance_scale=request.guidance_scale, model=card.names(request.maker)[0],
                first_frame=request.first_frame,
            )
            for prompt in request.prompts
            for start in range(0, request.n, most)
        ]  # fmt: skip

    async def _travel(
        self, names: list[str], stage_batch: StageBatch, say: Callable[[Step], None] | None = None
    ) -> tuple[Piece, float]:
        """Take a stage batch through the stages; return the last one's piece, with all seconds, and the seconds in all.

        Raises:
            Unavailable: replicas were lost again and again, or do not load the weights.
        """
        began, said, misses = time.perf_counter(), 0, 0
        alike = self._revisions if stage_batch.revision in self._revisions else [stage_batch.revision]
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
                piece = await self._pass(names, replace(stage_batch, revision=revision), once if say else None)
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

    async def _pass(self, names: list[str], stage_batch: StageBatch, say: Callable[[Step], None] | None) -> Piece:
        """Go through the stages once."""
        seconds: dict[str, float] = {}
        batches: dict[str, int] = {}
        piece = Piece(stage_batch)
        for name in names:
            if say is None or name in ("encoder", "decoder"):
                piece = await self.links[name].run(piece.stage_batch)
            else:
                piece = await self._watched(name, names[-1], piece.stage_batch, say)
            for part, took in piece.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + took
            batches |= piece.batches
        return replace(piece, seconds=seconds, batches=batches)

    async def _watched(self, name: str, last: str, stage_batch: StageBatch, say: Callable[[Step], None]) -> Piece:
        async with aclosing(self.links[name].watch(stage_batch)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    return event
                step = event.step
                if event.latents is not None:
                    shown = replace(stage_batch, conditions=None, latents=event.latents)
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


def _joined(results: list[tuple[Piece, float]]) -> GenerationResult:
    """Put the stage batches' pieces together: seconds of the slowest, the largest batch."""
    files = tuple(file for piece, _ in results for file in piece.files)
    seconds = {part: max(piece.seconds[part] for piece, _ in results) for part in results[0][0].seconds}
    seconds["total"] = max(took for _, took in results)
    batches = {part: max(piece.batches[part] for piece, _ in results) for part in results[0][0].batches}
    stage_batches = [piece.stage_batch for piece, _ in results]
    tokens = tuple(stage_batch.text_tokens for stage_batch in stage_batches if stage_batch.start == 0)  # once a prompt
    return GenerationResult(
        files, seconds, batches, stage_batches[0].revision, tokens, math.prod(stage_batches[0].shape[1:])
    )
