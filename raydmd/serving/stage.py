"""A stage: some parts of the way in one place, and the batches that they work on."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raydmd.errors import PortableError, UserError
from raydmd.models.base import Family
from raydmd.serving.card import Offer, experts_of, open_served, read_offer
from raydmd.serving.contract import Format, NotFinite, Size, Step, partial_steps
from raydmd.serving.parts import (
    Decoder,
    Encoder,
    Noise,
    Steps,
    TeacherSteps,
    denoised,
    expert_networks,
    initial,
    teacher_steps,
    text_tokens,
)
from raydmd.serving.settings import Serving

KEPT = 2  # revisions: requests that began with the one before are finished with it


class NoRevision(PortableError):
    """A request is for weights that this replica does not have."""


@dataclass(frozen=True)
class StageBatch:
    """What goes from stage to stage: some samples of one request.

    Attributes:
        previews: make a picture of each step.
        conditions: of its prompt, [1, ...] each; encoded by the first stage, the same from there on.
        latents: [count, ...].
        partial_images, compression, negative_prompt, steps, guidance_scale, first_frame: as
            `contract.GenerationRequest` has them; the first frame until it is encoded.
        model: the model's id, for the files.
        text_tokens: of its prompt, once it is encoded.
    """

    revision: str
    prompt: str
    seed: int
    start: int
    count: int
    shape: tuple[int, ...]
    size: Size | None
    output_format: Format
    previews: bool = False
    conditions: dict[str, np.ndarray] | None = None
    latents: np.ndarray | None = None
    partial_images: int = 0
    compression: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    model: str = ""
    text_tokens: int = 0
    first_frame: bytes | None = field(default=None, repr=False)

    def shows(self, step: Step) -> bool:
        """Say whether a step's picture is wanted."""
        return self.previews or step.number in partial_steps(self.partial_images, step.of)

    def about(self, sample: int) -> dict[str, str]:
        """Return what a picture's file says of itself; ``sample`` is its number in the stage batch."""
        return {"prompt": self.prompt, "seed": str(self.seed), "sample": str(self.start + sample), "model": self.model}


@dataclass(frozen=True)
class Piece:
    """What a stage made: the stage batch for the next stage, or files; seconds and batch sizes by part."""

    stage_batch: StageBatch
    files: tuple[bytes, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepPreview:
    """A step and what it promises: as pictures where the stage can decode, else as latents [count, ...]."""

    step: Step
    latents: np.ndarray | None = None


class Engine:
    """One revision's weights, of the parts that a stage has.

    Args:
        serving: names the folder.
        parts: the stage's.
        before: another revision of the same parts, whose text encoder, prompts encoded and VAE are used on where they
            are the same: in use, they must not be made again beside it.

    Raises:
        UserError: the run cannot be loaded.
    """

    def __init__(self, serving: Serving, parts: tuple[str, ...], before: "Engine | None" = None) -> None:
        self.student = open_served(serving, resolve=True)
        self.offer = read_offer(serving, self.student)
        self.revision = self.offer.card.revision
        self.device = torch.device("cuda" if serving.device != "cpu" and torch.cuda.is_available() else "cpu")
        recipe, phases = self.student.recipe, self.student.trained_phases()
        self.family: Family = self.student.family
        self.encoder: Encoder | None = None
        same = before and (before.student.recipe.teacher, before.student.recipe.prompts)
        if before and same == (recipe.teacher, recipe.prompts):
            self.family, self.encoder = before.family, before.encoder  # with the text encoder and the VAE in them
        elif "encode" in parts:
            self.encoder = Encoder(recipe, self.family, self.device)
        family, self.steps = self.family, sum(phase.steps for phase in phases)
        self.decoder = Decoder(family, self.device, serving.fps) if "decode" in parts else None
        indices = [int(part.removeprefix("expert-")) - 1 for part in parts if part.startswith("expert-")]
        here = experts_of(before.offer.card) if before else max(indices, default=-1) + 1
        whole = before is not None or len(indices) > 1  # else it may have one expert of several
        if indices and (len(phases) != here if whole else len(phases) < here):
            raise UserError(f"{self.student.kind} '{serving.run}' has {len(phases)} experts; {here} are served here: "
                            f"start the server anew")  # fmt: skip
        marks = self._marks()
        if indices:
            self.student.check_content()
        networks = expert_networks(self.student, indices, serving.weights, self.device) if indices else {}
        self.walks: dict[str, Steps | TeacherSteps] = {}
        for index, network in networks.items():
            first = 1 + sum(phase.steps for phase in phases[:index])
            self.walks[f"expert-{index + 1}"] = Steps(
                family, phases[index], first, network, recipe.method.solver, self.device
            )
        if "teacher" in parts:
            teacher = teacher_steps(self.student, serving.teacher_steps, self.device)
            self.walks["teacher"], self.steps = teacher, teacher.steps
        if self.student.revision() != self.revision or self._marks() != marks:
            raise UserError(f"{self.student.kind} '{serving.run}' changed while it was loaded")

    def _marks(self) -> list[tuple[int, int, int]]:
        """Return what tells whether the experts' files are written or replaced."""
        files = [file for phase in self.student.phases for file in self.student.files(phase.index)]
        stats = [file.stat() for file in files]
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


@dataclass(eq=False)
class _Job:
    stage_batch: StageBatch
    answer: asyncio.Future[Piece]
    preview: Callable[[StepPreview], None] | None
    since: float
    spent: dict[str, float]

    @property
    def bucket(self) -> tuple[object, ...]:
        """Jobs of one bucket can share a batch: same weights, and tensors of the same shapes."""
        shapes = tuple((name, rows.shape[1:]) for name, rows in sorted((self.stage_batch.conditions or {}).items()))
        return (
            self.stage_batch.revision,
            self.stage_batch.shape,
            shapes,
            self.stage_batch.steps,
            self.stage_batch.guidance_scale,
        )

    @property
    def gone(self) -> bool:
        return self.answer.done()


class Stage:
    """Takes stage batches, works on several at once, and gives them back.

    Batching needs no waiting: while the network works, stage batches gather, and the next pass takes of the oldest's
    bucket what fits. A stage batch alone is worked on at once.

    Args:
        serving: the settings.
        parts: of ``encode``, ``expert-1`` .. ``expert-K``, ``teacher``, ``decode``, in their order.

    Raises:
        UserError: the run cannot be loaded.
    """

    def __init__(self, serving: Serving, parts: tuple[str, ...], threads: int = 1) -> None:
        self.serving, self.parts, self.threads = serving, parts, threads
        engine = Engine(serving, parts)
        self._engines = {engine.revision: engine}
        self._served: str | None = None  # the revision of which the API said so
        self._worker = ThreadPoolExecutor(1, "stage", initializer=torch.set_num_threads, initargs=(threads,))
        self._queue: deque[_Job] = deque()
        self._working: asyncio.Task[None] | None = None

    @property
    def revisions(self) -> list[str]:
        """The weights that it has, the newest last."""
        return list(self._engines)

    async def offers(self, served: str) -> list[Offer]:
        """Return what the weights that are here offer, the newest last.

        Args:
            served: the revision that the caller serves now: it is kept until the caller serves another.
        """
        self._served = served
        return [engine.offer for engine in self._engines.values()]

    async def refresh(self) -> str:
        """Load what the run's folder holds now beside the weights that are served; return its revision.

        Requests for other weights are `NoRevision` from then on.

        Raises:
            UserError: it cannot be loaded, is not whole, or changed meanwhile; what is served stays.
        """
        newest = await asyncio.to_thread(lambda: open_served(self.serving, resolve=True).revision())
        engine = self._engines.pop(newest, None)
        if engine is None:
            kept = self._served if self._served in self._engines else self.revisions[-1]
            for old in self.revisions:  # before the new ones are loaded: there may be no room for more
                if old != kept:
                    del self._engines[old]
            engine = await asyncio.to_thread(Engine, self.serving, self.parts, self._engines[kept])
        self._engines[engine.revision] = engine
        return engine.revision

    async def run(self, stage_batch: StageBatch, preview: Callable[[StepPreview], None] | None = None) -> Piece:
        """Do the stage's parts for a stage batch; cancelled, its samples are left out.

        Args:
            stage_batch: the samples.
            preview: called with each step.

        Raises:
            NoRevision: it is for weights that are not here.
            BadRequest: a prompt that the model does not know.
        """
        engine, loop = self._engine(stage_batch.revision), asyncio.get_running_loop()
        spent: dict[str, float] = {}
        if stage_batch.conditions is None and engine.encoder is not None:
            began = time.perf_counter()
            encoder, sized = engine.encoder, engine.family.resized(stage_batch.shape)
            rows: dict[str, np.ndarray] | None
            if (frame := stage_batch.first_frame) is not None:
                call = partial(encoder.encode_first_frame, sized, stage_batch.prompt, frame)
                rows = await loop.run_in_executor(self._worker, call)
            else:
                texts = (stage_batch.prompt, stage_batch.negative_prompt)
                rows = encoder.known(*texts)
                if rows is None:
                    rows = await loop.run_in_executor(self._worker, encoder.encode, *texts)
            stage_batch = replace(
                stage_batch, conditions=sized.for_size(rows), text_tokens=text_tokens(rows), first_frame=None
            )
            spent["encode"] = time.perf_counter() - began
            if self.parts == ("encode",):
                return Piece(stage_batch, seconds=spent, batches={"encode": 1})
        job = _Job(stage_batch, loop.create_future(), preview, time.perf_counter(), spent)
        self._queue.append(job)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await job.answer

    async def watch(self, stage_batch: StageBatch) -> AsyncGenerator[StepPreview | Piece, None]:
        """Do as `run`, and yield each step before the piece."""
        seen: asyncio.Queue[StepPreview | None] = asyncio.Queue()
        task = asyncio.create_task(self.run(stage_batch, seen.put_nowait))
        task.add_done_callback(lambda _: seen.put_nowait(None))
        try:
            while (preview := await seen.get()) is not None:
                yield preview
            yield await task
        finally:
            task.cancel()

    async def preview(self, stage_batch: StageBatch) -> tuple[bytes, ...]:
        """Return a picture of each of a stage batch's latents, as they are on their way."""
        engine, loop = self._engine(stage_batch.revision), asyncio.get_running_loop()
        assert stage_batch.latents is not None
        return await loop.run_in_executor(
            self._worker, _preview, engine, stage_batch, torch.from_numpy(stage_batch.latents)
        )

    async def ready(self) -> None:
        """Return: weights are loaded when it is made."""

    def _engine(self, revision: str) -> Engine:
        if revision not in self._engines:
            raise NoRevision(revision)
        return self._engines[revision]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while jobs := self._next():
            engine = self._engines.get(jobs[0].stage_batch.revision)

            def say(job: _Job, preview: StepPreview) -> None:
                if job.preview is not None:
                    loop.call_soon_threadsafe(job.preview, preview)

            try:
                if engine is None:  # it was replaced twice while they waited
                    raise NoRevision(jobs[0].stage_batch.revision)
                pieces = await loop.run_in_executor(self._worker, _do, engine, self.parts, jobs, say)
            except Exception as error:
                for job in jobs:
                    if not job.gone:
                        job.answer.set_exception(error)
            else:
                for job, piece in zip(jobs, pieces, strict=True):
                    if job.gone:
                        continue
                    if isinstance(piece, NotFinite):
                        job.answer.set_exception(piece)
                    else:
                        job.answer.set_result(piece)

    def _next(self) -> list[_Job]:
        """Take the next batch off the queue: of the oldest's bucket, in order, at most ``max_batch`` samples."""
        waiting = [job for job in self._queue if not job.gone]
        batch: list[_Job] = []
        room = self.serving.max_batch
        for job in waiting:
            if batch and (job.bucket != batch[0].bucket or job.stage_batch.count > room):
                continue
            batch.append(job)
            room -= job.stage_batch.count
        self._queue = deque(job for job in waiting if job not in batch)
        return batch


@torch.inference_mode()
def _do(
    engine: Engine, parts: tuple[str, ...], jobs: list[_Job], say: Callable[[_Job, StepPreview], None]
) -> list[Piece | NotFinite]:
    """Work on a batch, in the stage's thread; a job whose pictures are not finite gets an error, the others theirs."""
    began = time.perf_counter()
    stage_batches = [job.stage_batch for job in jobs]
    noises = [Noise(p.seed, p.start + i) for p in stage_batches for i in range(p.count)]
    conditions: dict[str, Tensor] = {}
    for name in stage_batches[0].conditions or {}:
        repeated = [np.repeat(p.conditions[name], p.count, axis=0) for p in stage_batches if p.conditions]
        conditions[name] = torch.from_numpy(np.concatenate(repeated))
    if stage_batches[0].latents is None:
        x = initial(engine.family, noises, stage_batches[0].shape)
    else:
        x = torch.from_numpy(np.concatenate([p.latents for p in stage_batches if p.latents is not None]))
    seconds: dict[str, float] = {}
    batches: dict[str, int] = {}
    files: list[tuple[bytes, ...]] | None = None
    finite = np.ones(len(x), dtype=bool)
    for part in parts:
        since = time.perf_counter()
        if part in engine.walks:
            step_began, walk = since, engine.walks[part]
            if isinstance(walk, TeacherSteps):
                walk = walk.changed(stage_batches[0].steps, stage_batches[0].guidance_scale)
            total = walk.steps if isinstance(walk, TeacherSteps) else engine.steps
            for move in walk.walk(x, conditions, noises):
                if all(job.gone for job in jobs):
                    return [Piece(stage_batch) for stage_batch in stage_batches]  # nobody waits for them
                x, took = move.latents, time.perf_counter() - step_began
                if any(job.preview for job in jobs):
                    step = Step(move.number, total, part, move.t, move.t_next, took, ())
                    _show(engine, step, denoised(engine.family, move), jobs, say)
                step_began = time.perf_counter()
        elif part == "decode":
            assert engine.decoder is not None
            decoder = engine.decoder
            frames, finite = decoder.decode(x)
            each = iter(frames)
            files = [
                tuple(
                    decoder.file(next(each), p.size, p.output_format, p.compression, p.about(i)) for i in range(p.count)
                )
                for p in stage_batches
            ]
        else:
            continue  # texts are encoded before they wait
        seconds[part], batches[part] = time.perf_counter() - since, len(x)
    pieces: list[Piece | NotFinite] = []
    at = 0
    for number, (job, stage_batch) in enumerate(zip(jobs, stage_batches, strict=True)):
        spent = {**job.spent, "queue": began - job.since, **seconds}
        if files is not None and not finite[at : at + stage_batch.count].all():
            pieces.append(_not_finite(stage_batch, finite[at : at + stage_batch.count]))
        elif files is not None:
            pieces.append(Piece(replace(stage_batch, conditions=None, latents=None), files[number], spent, batches))
        else:
            latents = x[at : at + stage_batch.count].cpu().numpy()
            pieces.append(Piece(replace(stage_batch, latents=latents), (), spent, batches))
        at += stage_batch.count
    return pieces


def _not_finite(stage_batch: StageBatch, finite: np.ndarray) -> NotFinite:
    first = stage_batch.start + int(np.flatnonzero(~finite)[0])
    return NotFinite(
        f"picture {first} of seed {stage_batch.seed} is not finite: the model's weights have diverged, or its "
        "precision is too small"
    )


def _show(
    engine: Engine, step: Step, clean: Tensor, jobs: list[_Job], say: Callable[[_Job, StepPreview], None]
) -> None:
    """Tell those who watch of a step."""
    at = 0
    for job in jobs:
        rows, at = clean[at : at + job.stage_batch.count], at + job.stage_batch.count
        if job.preview is None or job.gone:
            continue
        if not job.stage_batch.shows(step):
            say(job, StepPreview(step))
        elif engine.decoder is None:
            say(job, StepPreview(step, rows.cpu().numpy()))
        else:
            say(job, StepPreview(replace(step, pictures=_preview(engine, job.stage_batch, rows))))


@torch.inference_mode()
def _preview(engine: Engine, stage_batch: StageBatch, latents: Tensor) -> tuple[bytes, ...]:
    assert engine.decoder is not None
    decoder, kind = engine.decoder, "png" if stage_batch.output_format == "mp4" else stage_batch.output_format
    return tuple(
        decoder.file(frames, stage_batch.size, kind, stage_batch.compression) for frames in decoder.preview(latents)
    )
