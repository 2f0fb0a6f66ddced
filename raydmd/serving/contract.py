"""What the HTTP side and the machinery behind it know of each other: a request goes in, steps and pictures come out."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from raydmd.errors import PortableError

Maker = Literal["student", "teacher"]
Format = Literal["png", "jpeg", "webp", "mp4"]
FirstFrame = Literal["none", "optional", "required"]
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class GenerationRequest:
    """A request for pictures. Picture i of a seed is the same whatever ``n``, the batch or the layout is.

    Attributes:
        prompt: what to make; of several prompts, each is made ``n`` times, from the same seed.
        n: how many of a prompt.
        seed: of the initial noise.
        maker: the few-step student, or its many-step teacher.
        size: of a picture; None for the model's own.
        output_format: ``mp4`` for videos alone.
        previews: say each step as it is made, with a picture of what it promises.
        partial_images: so many of the steps (see `partial_steps`) have a picture, where not all have one.
        compression: quality of JPEG and WebP files, 0 to 100; None for the server's own.
        negative_prompt: of the teacher; None for the model's own.
        steps: of the teacher; None for the server's.
        guidance_scale: of the teacher; None for the recipe's.
        first_frame: of videos that begin at a picture: its pixels, a byte a value, [3, height, width] of ``size``.
    """

    prompt: str | tuple[str, ...]
    n: int = 1
    seed: int = 0
    maker: Maker = "student"
    size: Size | None = None
    output_format: Format = "png"
    previews: bool = False
    partial_images: int = 0
    compression: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    first_frame: bytes | None = field(default=None, repr=False)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, one or several."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def samples(self) -> int:
        """How many pictures are made in all."""
        return self.n * len(self.prompts)


def partial_steps(count: int, of: int) -> list[int]:
    """Return which of ``of`` steps (from 1) have a picture where ``count`` are wanted: evenly spread, not the last.

    The last step's picture is the final one; fewer come where there are fewer steps.
    """
    numbers = {round(i * of / (count + 1)) for i in range(1, count + 1)}
    return sorted(number for number in numbers if 0 < number < of)


@dataclass(frozen=True)
class Step:
    """A step on the way from noise to the pictures, just made.

    Attributes:
        number: from 1.
        of: how many there are.
        made_by: ``expert-1`` .. ``expert-K``, or ``teacher``.
        t: the noise level at which it began, in the schedule's time (1 is noise, 0 is data).
        t_next: where it ended.
        seconds: what the network took for the batch that it was made in.
        pictures: a file for each sample, of the asked format: the network's prediction of the clean picture. Empty
            where none was asked for.
    """

    number: int
    of: int
    made_by: str
    t: float
    t_next: float
    seconds: float
    pictures: tuple[bytes, ...]


@dataclass(frozen=True)
class GenerationResult:
    """What was asked for.

    Attributes:
        pictures: files of the asked format, one a sample (one a video); the first prompt's come first.
        seconds: by stage, as ``encode``, ``expert-1``, ``decode``: its work on the batch; ``queue``: all the waiting.
        batches: by stage: how many samples were in the batch.
        revision: of the weights.
        text_tokens: of each prompt, as the network reads it.
        image_tokens: positions of a sample's latents.
    """

    pictures: tuple[bytes, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    batches: Mapping[str, int] = field(default_factory=dict)
    revision: str = ""
    text_tokens: tuple[int, ...] = ()
    image_tokens: int = 0


@dataclass(frozen=True)
class StepPlan:
    """A step that every picture takes: who makes it, from which noise level to which."""

    made_by: str
    t: float
    t_next: float


@dataclass(frozen=True)
class Card:
    """What is served.

    Attributes:
        name: the model's id in the API; its teacher's is ``NAME-teacher``.
        kind: what it makes.
        family: the network's family.
        sizes: of pictures, the model's own first.
        prompts: the only prompts that it knows, or None if it takes any text.
        steps: of the student.
        teacher_steps: of the teacher; None if it is not loaded.
        guidance_scale: of the teacher; of one of two networks, each one's.
        frames: of a video; 1 for pictures.
        fps: of a video.
        layout: ``colocated``, ``pipelined`` or ``in-process``.
        revision: of the weights.
        created: when they were written, in seconds since 1970.
        aliases: further names of the model.
        negative_prompts: the teacher can be given a negative prompt.
        null_prompt: there is a null prompt, without which the teacher cannot be guided.
        export: the format of an export that is served; None: it is a run.
        first_frame: whether a request may, or has to, bring a video's first frame. Where it may, the prompt without one
            is a row of the run's own prompts.
    """

    name: str
    kind: Literal["image", "video"]
    family: str
    sizes: tuple[Size, ...]
    prompts: tuple[str, ...] | None
    steps: tuple[StepPlan, ...]
    teacher_steps: int | None
    guidance_scale: float | tuple[float, float]
    frames: int
    fps: int
    layout: str
    revision: str
    created: int
    aliases: tuple[str, ...] = ()
    negative_prompts: bool = False
    null_prompt: bool = True
    export: str | None = None
    first_frame: FirstFrame = "none"

    def names(self, maker: Maker = "student") -> tuple[str, ...]:
        """Return the ids by which a maker can be asked for, its own first."""
        return tuple(name if maker == "student" else f"{name}-teacher" for name in (self.name, *self.aliases))


def no_first_frame(card: Card) -> str:
    """Return why a model takes no first frame."""
    return f"input_reference: '{card.name}' takes no first frame here; leave it out"


def needs_first_frame(card: Card) -> str:
    """Return why a model does not do without a first frame."""
    return f"input_reference: the videos of '{card.name}' begin at a picture; send one"


def no_negative_prompt(card: Card) -> str:
    """Return why a model's teacher takes no negative prompt."""
    if not card.null_prompt:
        return f"negative_prompt: '{card.name}' has no null prompt here (teacher.options.null_prompt); leave it out"
    return f"negative_prompt: '{card.name}' has no text encoder here, and its null prompt is its own; leave it out"


class Overloaded(PortableError):
    """More is asked for than can be made soon; nothing was begun.

    Attributes:
        retry_after: seconds after which to ask again.
        full_seconds: for which it is full for everybody; 0: somebody might be let in, for less or by another replica.
        maker: for whose requests it is full: the student's and the teacher's wait apart.
    """

    def __init__(self, retry_after: float, full_seconds: float, maker: Maker = "student") -> None:
        super().__init__(f"too many requests wait already; try again in {retry_after:.0f} s")
        self.retry_after, self.full_seconds, self.maker = retry_after, full_seconds, maker


class Unavailable(PortableError):
    """There is nobody to do it: replicas start, or died again and again."""


class BadRequest(PortableError):
    """A request that this model cannot do.

    Attributes:
        param: the field to blame.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class NotFinite(PortableError):
    """A picture was made that holds what is no number; its neighbours in the batch are whole."""


class Backend(Protocol):
    """Makes pictures: in this process, or by Ray Serve's replicas.

    A call that is cancelled leaves its work undone as soon as it can; its neighbours in a batch do not notice.
    """

    def card(self) -> Card:
        """Say what is served now."""

    async def check(self, request: GenerationRequest) -> None:
        """Refuse what is known to be wrong before anything is made, or waits: what passes may be wrong still.

        Raises:
            BadRequest: as `make`.
        """

    async def make(self, request: GenerationRequest) -> GenerationResult:
        """Make pictures.

        Raises:
            BadRequest: a prompt or size that the model does not know, a teacher that is not loaded.
            Overloaded: the queue is full.
            NotFinite: what was made is no picture.
            Unavailable: there is no replica.
        """

    def watch(self, request: GenerationRequest) -> AsyncGenerator[Step | GenerationResult, None]:
        """Make pictures and say each step; the last is what `make` returns. It raises as `make` does."""

    async def ready(self) -> None:
        """Return once a request could be served: whoever asks waits no longer than it likes.

        Raises:
            Unavailable: it could not.
        """

    def queued(self) -> int:
        """Return how many samples are asked for and not made yet."""
