"""What a report shows of a teacher and a student: pictures for equal seeds, the way from noise, the phases' ends."""

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydmd.data import ring
from raydmd.data.digits import CLASSES, load_digits
from raydmd.diffusion.random import Key, normal
from raydmd.errors import UserError
from raydmd.evaluation.evaluate import complete
from raydmd.evaluation.pictures import Limits, grid, in_plane, limits_of, png, scatter
from raydmd.evaluation.prompts import in_turn, words_in_turn
from raydmd.models.diffusers.hub import HUB
from raydmd.runs.run import Run
from raydmd.sampling.noise import initial_noise
from raydmd.sampling.phase import Phase
from raydmd.sampling.student import StudentSamples, sample_student
from raydmd.training.teacher import Scorer

SEED = 0
ON_THE_WAY = 6
LARGE = 2**30
EXPERTS = ("#8b5cf6", "#0d9f9a", "#e58a1f", "#d6457f", "#4d7cd6", "#7a9a2b", "#b4603c", "#7b8794")
GREY = "#7f8794"


@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        title: above it.
        note: under the title, fainter.
        alt: says what it shows to those who cannot see it.
        source: a data URI.
        color: of its frame; empty for none.
        width: in pixels.
        height: in pixels.
    """

    title: str
    note: str
    alt: str
    source: str
    color: str
    width: int
    height: int


class Exhibits:
    """Draws samples of one family, all from the same noise: sample i has the same noise in every panel.

    Args:
        run: any run on the teacher.

    Raises:
        UserError: the teacher or the prompts are missing, or it is too large to be sampled without a GPU.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.family = run, run.family
        self.embedded = self.family.name in ("digits", "ring")
        self.device = "cpu" if self.embedded else sampling_device(run)
        self.teacher = run.teacher().to(self.device)
        self.scorer = Scorer(run.recipe, self.family, self.teacher, device=self.device)
        self.points = in_plane(self.family)
        self.columns = 10 if self.family.name == "digits" else 4
        self.count = 1500 if self.points else 60 if self.family.name == "digits" else 8
        self.conditions = in_turn(run.recipe, self.family, self.count)
        self.prompts = words_in_turn(run.recipe, self.family, self.count)
        self.noise = initial_noise(self.family, SEED, 0, self.count)
        self._batch = self.count if self.embedded else 1
        self.many = self._follow(run.recipe.teacher.steps, "heun")
        self.limits = limits_of(torch.cat([self.many, self._data()])) if self.points else None

    def teacher_panels(self, few: list[int]) -> list[Picture]:
        """Return the data, the teacher's many-step samples and its Euler samples of ``few`` steps."""
        asked = self.run.recipe.teacher
        panels = []
        if self.embedded:
            note = "" if self.points else "other samples, of the same classes"
            panels.append(self._panel(self._data(), "data", note, ""))
        panels.append(self._panel(self.many, "teacher", f"Heun, {asked.steps} steps", ""))
        for steps in few:
            words = f"Euler, {steps} step{'s' * (steps > 1)}"
            panels.append(self._panel(self._follow(steps, "euler"), "teacher", words, ""))
        return panels

    def student(self, run: Run) -> StudentSamples:
        """Return a run's samples, as far as its experts are trained."""
        phases, experts = run.trained_phases(), run.experts(self.teacher, finite=False).to(self.device)
        conditions = {name: value.to(self.device) for name, value in self.conditions.items()}
        return sample_student(
            self.family, experts, phases, conditions, self.count,
            seed=SEED, solver=run.recipe.method.solver, device=self.device,
        )  # fmt: skip

    def student_panel(self, run: Run, made: StudentSamples, color: str) -> Picture:
        """Return a student's samples as a panel."""
        phases = run.trained_phases()
        steps = sum(phase.steps for phase in phases)
        note = f"student, {steps} step{'s' * (steps > 1)}"
        if phases[-1].end > 0:
            note += f", still at t = {phases[-1].end:.3g}"
        return self._panel(made.latents, run.name, note, color)

    def path(self, made: StudentSamples) -> list[Picture]:
        """Return a student's samples step by step, each framed in the colour of the expert that made it."""
        pictures = []
        for number, (expert, t, x) in enumerate(made.path):
            title = "noise" if number == 0 else f"expert {expert + 1}"
            color = EXPERTS[expert % len(EXPERTS)] if number else GREY
            pictures.append(self._column(x, title, f"t = {t:.3g}", color))
        return [*pictures, self._column(self.many, "teacher", "same noise", "")]

    def boundary(self, phase: Phase, made: StudentSamples, position: int) -> list[Picture]:
        """Return x_s at a phase's end, the truth there, and both students' ways on: the teacher's and the experts'."""
        x_s, s = made.boundaries[position], phase.end
        noise = normal(Key(SEED, 0, "report/truth", phase.index), 0, self.count, self.family.latent_shape)
        clean = self._data() if self.points else self.many
        truth = self.family.schedule.diffuse(clean, noise, s)
        completed = complete(self.scorer, x_s, self.conditions, batch=self._batch, start=s)
        color = EXPERTS[phase.index % len(EXPERTS)]
        shown = [
            self._column(truth, "truth", f"at s = {s:.3g}", ""),
            self._column(x_s, f"expert {phase.index + 1}", f"at s = {s:.3g}", color),
            self._column(completed, "teacher", "goes on", ""),
        ]
        if position + 1 < len(made.boundaries):
            color = EXPERTS[made.path[-1][0] % len(EXPERTS)]
            shown.append(self._column(made.boundaries[-1], "experts", "go on", color))
        return shown

    def truth_spread(self, phase: Phase) -> float:
        """Return the standard deviation of the teacher's samples diffused to a phase's end, over all elements."""
        noise = normal(Key(SEED, 0, "report/truth", phase.index), 0, self.count, self.family.latent_shape)
        return float(self.family.schedule.diffuse(self.many, noise, phase.end).std())

    def _follow(self, steps: int, method: str) -> Tensor:
        return complete(self.scorer, self.noise, self.conditions, batch=self._batch, steps=steps, method=method)

    def _data(self) -> Tensor:
        """Return real samples: for digits with the panels' labels in order."""
        if self.family.name == "ring":
            return ring.sample(self.count, Key(SEED, 0, "report/data", 0))
        images, labels = load_digits()
        of_class = [images[labels == label] for label in range(CLASSES)]
        return torch.stack([of_class[i % CLASSES][i // CLASSES] for i in range(self.count)])

    def _decode(self, latents: Tensor) -> Tensor:
        return self.family.decode(latents.to(self.device)).cpu()

    def _panel(self, latents: Tensor, title: str, note: str, color: str) -> Picture:
        pictures = self._decode(latents)
        image = self._scatter(pictures, color) if self.points else grid(pictures, self.columns, 32)
        what = f"{len(pictures)} points" if self.points else f"{len(pictures)} pictures in rows of {self.columns}"
        order = ", column by column the digits 0 to 9" if self.family.name == "digits" else ""
        if self.prompts:
            order = f", row by row: {'; '.join(self.prompts)}"
        who = f"{title} ({note})" if note else title
        return _picture(image, title, note, f"{who}: {what}{order}", color)

    def _column(self, latents: Tensor, title: str, note: str, color: str) -> Picture:
        if self.points:
            return _picture(self._scatter(latents, color, 220), title, note, f"{title}, {note}: points", color)
        pictures = self._decode(latents[:ON_THE_WAY])
        image = grid(pictures, 1, 48)
        return _picture(image, title, note, f"{title}, {note}: {len(pictures)} samples, one below the other", color)

    def _scatter(self, points: Tensor, color: str, size: int = 360) -> Image.Image:
        limits: Limits | None = self.limits
        return scatter(points, limits, color=color or GREY, size=size, transparent=True)


def sampling_device(run: Run) -> str:
    """Return where to sample a run on a pretrained teacher: a GPU, or the CPU when the teacher is small.

    Raises:
        UserError: there is no GPU, and the teacher has more than a gigabyte of weights.
    """
    if run.recipe.runtime.device != "cpu" and torch.cuda.is_available():
        return "cuda"
    path = str(run.family.path)
    size = sum(file.stat().st_size for file in Path(path).rglob("*.safetensors"))
    if size > LARGE or path.startswith(HUB):
        raise UserError(f"the teacher in '{path}' is too large to be sampled without a GPU")
    return "cpu"


def picture_file(image: Image.Image, title: str, alt: str) -> Picture:
    """Return an image that is there already as a picture of the page."""
    return _picture(image, title, "", alt, "")


def _picture(image: Image.Image, title: str, note: str, alt: str, color: str) -> Picture:
    if image.mode == "RGBA":  # a scatter: few colours, and an 8-bit palette is a third of the size
        image = Image.fromarray(np.asarray(image)).quantize(64, method=Image.Quantize.FASTOCTREE)
    source = "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
    return Picture(title, note, alt, source, color, image.width, image.height)
