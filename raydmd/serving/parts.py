"""The parts of a picture's way: text to conditions, each expert's steps, the teacher's, latents to files."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydmd.config.recipe import Recipe
from raydmd.diffusion.random import normal
from raydmd.errors import UserError
from raydmd.evaluation.pictures import finite_samples, from_pixels, png_text
from raydmd.evaluation.prompts import from_first_frame, from_text, own_prompts
from raydmd.evaluation.videos import video
from raydmd.models.base import Conditions, Family
from raydmd.models.encoding import encodes_first_frames
from raydmd.models.experts import Expert
from raydmd.runs.student import Student
from raydmd.sampling.noise import renoise_key, sample_key, starting_latents
from raydmd.sampling.phase import Phase
from raydmd.sampling.student import Move, walk
from raydmd.sampling.teacher import first_time, noise_at
from raydmd.serving.contract import BadRequest, Format, Size
from raydmd.serving.settings import Weights
from raydmd.training.teacher import Scorer

KEPT_BYTES = 256 * 2**20  # of encoded prompts
QUALITY = 95  # of JPEG and WebP files, where nobody says another


@dataclass(frozen=True)
class Noise:
    """Where a sample's random numbers come from: sample ``index`` of ``seed``."""

    seed: int
    index: int

    def draw(self, shape: tuple[int, ...], again: int = 0) -> Tensor:
        """Return normal numbers [*shape]: the initial ones, or those that renoise step ``again`` adds."""
        key = sample_key(self.seed)
        return normal(renoise_key(key, again) if again else key, self.index, 1, shape)[0]


def initial(family: Family, noises: list[Noise], shape: tuple[int, ...]) -> Tensor:
    """Return the latents [B, *shape] from which samples begin, as `sampling.noise.initial_noise` has them."""
    return starting_latents(family, torch.stack([noise.draw(shape) for noise in noises]))


class Encoder:
    """Prompts to conditions. Those of late are kept: people ask for the same prompt again.

    Raises:
        UserError: there is a text encoder, but it cannot be loaded.
    """

    def __init__(self, recipe: Recipe, family: Family, device: torch.device) -> None:
        self.recipe, self.family, self.device = recipe, family, device
        self._kept: dict[str, dict[str, np.ndarray]] = {}  # the oldest first
        self._bytes = 0
        if family.reads_text or encodes_first_frames(family):
            family.encode_prompts([""], device)  # so that it is loaded before anybody waits for it
        for prompt in own_prompts(family) or ():
            self.encode(prompt)

    def known(self, prompt: str, negative: str | None = None) -> dict[str, np.ndarray] | None:
        """Return a prompt's conditions if they were made already."""
        rows, other = self._kept.get(prompt), None if negative is None else self._kept.get(negative)
        if rows is None or negative is None:
            return rows
        return None if other is None else _against(rows, other)

    def encode(self, prompt: str, negative: str | None = None) -> dict[str, np.ndarray]:
        """Return a prompt's conditions, one row each; to be left as they are.

        Args:
            prompt: the text.
            negative: stands in the null prompt's place, where texts are encoded as they come.

        Raises:
            BadRequest: the model does not know it.
        """
        if negative is not None:
            return _against(self.encode(prompt), self.encode(negative))
        if (known := self.known(prompt)) is not None:
            return known
        try:
            rows = from_text(self.recipe, self.family, prompt, 1, "prompt", self.device)
        except UserError as error:
            raise unknown_prompt(error, self.recipe.prompts.path, encodes_first_frames(self.family)) from None
        made = {name: row.cpu().numpy() for name, row in rows.items()}
        self._kept[prompt] = made
        self._bytes += _bytes(made)
        while self._bytes > KEPT_BYTES:
            self._bytes -= _bytes(self._kept.pop(next(iter(self._kept))))
        return made

    def encode_first_frame(self, sized: Family, prompt: str, frame: bytes) -> dict[str, np.ndarray]:
        """Return the conditions of a text and a first frame, one row each; they are not kept.

        Args:
            sized: the family at the samples' size.
            prompt: the text.
            frame: as `contract.GenerationRequest` has it.

        Raises:
            BadRequest: the model takes none.
        """
        width, height = sized.picture_size
        pixels = np.frombuffer(bytearray(frame), np.uint8).reshape(3, height, width)
        try:
            rows = from_first_frame(sized, prompt, pixels, 1, self.device, self.family)
        except UserError as error:
            raise BadRequest(str(error), "input_reference") from None
        return {name: row.cpu().numpy() for name, row in rows.items()}


def unknown_prompt(error: UserError, place: str | None, takes_frame: bool) -> BadRequest:
    """Return what a client is told of a prompt that is not among the run's.

    Args:
        error: names it.
        place: the run's prompts, whose path is not told.
        takes_frame: a prompt of one's own can come with a first frame.
    """
    words = str(error).replace(place, Path(place).name) if place else str(error)
    more = "; a prompt of your own comes with a first frame: input_reference" if takes_frame else ""
    return BadRequest(f"{words}{more}", "prompt")


def _against(rows: dict[str, np.ndarray], negative: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a prompt's conditions with another's in the null prompt's place."""
    swapped = {f"negative_{name}": row for name, row in negative.items() if f"negative_{name}" in rows}
    return {**rows, **swapped}


def text_tokens(rows: dict[str, np.ndarray]) -> int:
    """Return how many tokens of a prompt's conditions the network reads: rows of padding do not count."""
    if (mask := rows.get("prompt_embeds_mask")) is not None:
        return int(mask.astype(bool).sum())
    if (embeddings := rows.get("prompt_embeds")) is not None:
        return int(embeddings.any(axis=-1).sum())
    return len(rows)  # a label is one


def _bytes(rows: dict[str, np.ndarray]) -> int:
    return sum(row.nbytes for row in rows.values()) + 1000  # and what Python takes for it


class Steps:
    """An expert's steps: its network on its phase's grid.

    Args:
        family: the network's.
        phase: the expert's.
        first: number of its first step on the whole way, from 1.
        network: the expert's.
        solver: ``euler`` or ``renoise``.
        device: where the network is.
    """

    def __init__(
        self, family: Family, phase: Phase, first: int, network: Expert, solver: str, device: torch.device
    ) -> None:
        self.family, self.phase, self.first, self.network = family, phase, first, network
        self.solver, self.device = solver, device

    def walk(self, x: Tensor, conditions: Conditions, noises: list[Noise]) -> Iterator[Move]:
        """Make the steps from ``x`` [B, ...] one by one."""
        x, conditions = x.to(self.device), {name: value.to(self.device) for name, value in conditions.items()}

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, conditions)

        def renoise(number: int) -> Tensor:
            return torch.stack([noise.draw(tuple(x.shape[1:]), number) for noise in noises]).to(self.device)

        fresh = None if self.solver == "euler" else renoise
        yield from walk(self.family, denoise, self.phase.times, x, renoise=fresh, first=self.first)


class TeacherSteps:
    """The teacher's many Euler steps with guidance: twice the network's work a step.

    Args:
        scorer: the teacher.
        steps: how many.
        guidance_scale: None for the recipe's.
    """

    def __init__(self, scorer: Scorer, steps: int, guidance_scale: float | None = None) -> None:
        self.scorer, self.family, self.steps = scorer, scorer.family, steps
        self.guidance_scale = guidance_scale
        scorer.times(steps)  # refused now, not at the first request

    def changed(self, steps: int | None, guidance_scale: float | None) -> "TeacherSteps":
        """Return the same teacher with other steps and guidance, where they are given."""
        if steps is None and guidance_scale is None:
            return self
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return TeacherSteps(self.scorer, steps or self.steps, scale)

    def walk(self, x: Tensor, conditions: Conditions, noises: list[Noise]) -> Iterator[Move]:
        """Make the steps from noise ``x`` [B, ...] one by one."""
        times = self.scorer.times(self.steps, tuple(x.shape[1:]))
        x = noise_at(self.family, x.to(self.scorer.device), first_time(self.family, times))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.scorer.predict(x, t, conditions, self.guidance_scale)

        yield from walk(self.family, predict, times, x)


def denoised(family: Family, move: Move) -> Tensor:
    """Return the x_0 [B, ...] that a step's network predicts."""
    return family.schedule.denoised_pair(move.prediction, move.before, move.t, family.prediction)[0]


def expert_networks(
    student: Student, indices: list[int], weights: Weights | None, device: torch.device
) -> dict[int, Expert]:
    """Load experts: each its own network (LoRA merged into it), or adapters switched on one backbone.

    Args:
        student: the experts'.
        indices: which of them.
        weights: None: ``switched`` where the frozen weights are of half precision, which would round the adapters'
            effect away, else ``fused``.
        device: where they are put.

    Raises:
        UserError: an expert or the teacher is missing or does not fit, or cannot be merged.
    """
    if weights is None:
        weights = "fused" if student.family.options.get("dtype", "float32") == "float32" else "switched"
    if student.recipe.method.experts.kind == "lora" and weights == "switched":
        experts = student.experts_on(device)
        return {index: experts.expert(index) for index in indices}
    return {index: student.expert_network(index).to(device) for index in indices}


class Decoder:
    """Latents to pictures, and pictures to files."""

    def __init__(self, family: Family, device: torch.device, fps: int) -> None:
        self.family, self.device, self.fps = family, device, fps

    def decode(self, latents: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return frames [B, F, 1 or 3, H, W], uint8, and whether each sample is finite, [B]; grey where it is not."""
        values = self.family.decode_video(latents.to(self.device)).float()
        return _eight_bits(values), finite_samples(latents, values).cpu().numpy()

    def preview(self, latents: Tensor) -> np.ndarray:
        """Return a picture [B, 1, 1 or 3, H, W] of latents on their way: a video's middle frame.

        It is grey where it is not finite.
        """
        return _eight_bits(self.family.decode(latents.to(self.device)).float())[:, None]

    def file(
        self,
        frames: np.ndarray,
        size: Size | None,
        output_format: Format,
        compression: int | None = None,
        about: Mapping[str, str] | None = None,
    ) -> bytes:
        """Return frames [F, 1 or 3, H, W], uint8, as a file; enlarged without smoothing where they are smaller.

        Args:
            frames: of a video; of a picture, the first is taken.
            size: in pixels; None: as they are.
            output_format: of the file.
            compression: see `picture`.
            about: see `picture`.
        """
        images = [from_pixels(frame) for frame in frames]
        if size is not None and images[0].size != size:
            images = [image.resize(size, Image.Resampling.NEAREST) for image in images]
        if output_format == "mp4":
            return video(images, self.fps)
        return picture(images[0], output_format, compression, about)


def _eight_bits(values: Tensor) -> np.ndarray:
    values = torch.where(values.isfinite(), values.clamp(0, 1), 0.5)
    return (values * 255).round().to(torch.uint8).cpu().numpy()


def picture(
    image: Image.Image,
    output_format: Format,
    compression: int | None = None,
    about: Mapping[str, str] | None = None,
) -> bytes:
    """Return an image as a file's bytes.

    Args:
        image: the picture.
        output_format: ``png``, ``jpeg`` or ``webp``.
        compression: quality of JPEG and WebP, 0 (smallest) to 100 (best); None: `QUALITY`. PNG loses nothing.
        about: what a PNG says of itself: text by keyword.
    """
    buffer = io.BytesIO()
    if output_format == "png":
        image.save(buffer, format="PNG", compress_level=4, pnginfo=png_text(about or {}))
    else:
        image.save(buffer, format=output_format.upper(), quality=QUALITY if compression is None else compression)
    return buffer.getvalue()


def teacher_steps(student: Student, steps: int | None, device: torch.device) -> TeacherSteps:
    """Load the teacher.

    Raises:
        UserError: it is missing.
    """
    scorer = Scorer(student.recipe, student.teacher_family, student.teacher(), device=device)
    return TeacherSteps(scorer, steps or student.recipe.teacher.steps)
