"""A request's way through the stages: in parcels, again from the start when a replica is lost on the way."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from raydmd.errors import PortableError, UserError
from raydmd.evaluation.prompts import own_prompts
from raydmd.models.protocol import Family
from raydmd.runs import Run
from raydmd.serving.admission import Admission
from raydmd.serving.contract import (
    Ask,
    BadAsk,
    Card,
    Made,
    Maker,
    Size,
    Step,
    StepPlan,
    Unavailable,
    no_negative_prompt,
)
from raydmd.serving.settings import Serving
from raydmd.serving.stage import Glimpse, NoRevision, Parcel, Piece

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


def read_card(serving: Serving) -> Card:
    """Return what a run's folder has to offer.

    Raises:
        UserError: no run, one that is not trained to its end, or one that makes no pictures.
    """
    run = Run(serving.run)
    phases = run.trained_phases()
    if len(phases) < len(run.phases):
        raise UserError(f"run '{run.folder}' has experts for {len(phases)} of {len(run.phases)} phases: "
                        f"train it to its end")  # fmt: skip
    family = run.family
    if len(family.latent_shape) < 3:
        raise UserError(f"run '{run.folder}' makes points in the plane, not pictures: there is nothing to serve")
    sizes = (family.picture_size, *(size for size in serving.sizes if size != family.picture_size))
    for size in sizes:
        family.shape_for(*size)
    return Card(
        name=serving.name or run.name,
        kind="video" if family.frames > 1 else "image",
        family=family.name,
        sizes=sizes,
        prompts=own_prompts(family),
        steps=tuple(
            StepPlan(f"expert-{phase.index + 1}", phase.times[i], phase.times[i + 1])
            for phase in phases
            for i in range(phase.steps)
        ),
        teacher_steps=(serving.teacher_steps or run.recipe.teacher.steps) if serving.teacher else None,
        guidance_scale=run.recipe.teacher.guidance_scale,
        frames=family.frames,
        fps=serving.fps,
        layout=serving.layout,
        revision=run.revision(),
        created=int(run.expert_file(0).stat().st_mtime),
        aliases=tuple(serving.aliases),
        negative_prompts=serving.teacher and family.reads_text,
    )


def experts_of(card: Card) -> int:
    """Return how many experts make the pictures."""
    return len({step.made_by for step in card.steps})


class Pipeline:
    """The `contract.Backend` over stages.

    Args:
        serving: the settings.
        links: the stages by name, as `stages_of` names them, and ``teacher`` if it is served.
    """

    def __init__(self, serving: Serving, links: Mapping[str, Link]) -> None:
        self.links = links
        limits = (serving.queue_samples, serving.queue_seconds, serving.api_replicas == 1)
        self.admissions: dict[Maker, Admission] = {
            maker: Admission(*limits, maker)
            for maker in ("student", "teacher")  # neither waits in the other's queue
        }
        self.serving = serving
        self._use(read_card(serving))

    def _use(self, card: Card) -> None:
        run = Run(self.serving.run)
        shapes = [run.family.shape_for(*size) for size in card.sizes]
        texts = card.prompts or run.family.reads_text or run.recipe.prompts.path
        self._card = card
        self._family: Family = run.family
        self._chain = list(stages_of(self.serving, experts_of(card)))
        self._terms = (card.kind, card.family, card.sizes, shapes, texts)  # weights alike in these can stand in
        self._revisions = [card.revision]

    async def refresh(self) -> str:
        """Serve what the run's folder holds now: its weights where they are loaded, meanwhile the ones before.

        Requests that the ones before cannot do (of another shape, or for other prompts) wait for its weights.

        Raises:
            UserError: it cannot be served, or has other stages; the present run stays.
        """
        card, before = await asyncio.to_thread(read_card, self.serving), self._card
        if card.revision != before.revision:
            if experts_of(card) != experts_of(before):
                now, here = experts_of(card), experts_of(before)
                raise UserError(f"run '{self.serving.run}' has {now} experts now, and {here} are served here: "
                                f"start the server anew")  # fmt: skip
            terms, revisions = self._terms, self._revisions
            self._use(card)
            if self._terms == terms:
                revisions[:] = [card.revision, before.revision]  # in place: requests on their way may go over to them
                self._revisions = revisions
        return card.revision

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
        shape, most = self._family.shape_for(*size), self.serving.max_batch
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
