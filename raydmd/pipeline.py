"""A student to call from Python, and the one way in which samples are made of prompts, `raydmd generate`'s too."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from raydmd.errors import RunError, UserError
from raydmd.evaluation.pictures import finite_samples, in_plane, scatter, to_image
from raydmd.evaluation.prompts import from_text
from raydmd.evaluation.sizes import choose_size, trained_sizes
from raydmd.export.exported import Export
from raydmd.models.base import Conditions
from raydmd.models.experts import Experts
from raydmd.runs.run import Run
from raydmd.runs.student import Student
from raydmd.sampling.student import sample_student

Output = Literal["pil", "pt", "latent"]
OnStep = Callable[[int, float, Tensor], None]
LARGEST_SEED = 2**63 - 1


class StudentPipeline:
    """A finished run's experts, or an export's, that turn prompts into pictures or videos in their few steps.

    Its weights are loaded at the first call. Sample I of a prompt and a seed is the same whatever else is made in the
    call, and the same as `raydmd generate` makes.

    Args:
        student: a run or an export, open.
        device: where it computes; default: CUDA where there is one and the recipe does not say ``cpu``.
        size: ``WIDTHxHEIGHT``, one that the student was trained for; default: that of its previews.
        frames: of videos, likewise.

    Raises:
        UserError: a run that is not finished, or a size that it was not trained for.

    Examples:
        >>> pipeline = StudentPipeline.from_run("runs/digits")  # doctest: +SKIP
        >>> pictures = pipeline(["3", "7"], num_images=4, seed=0)  # doctest: +SKIP
        >>> pictures[0].save("three.png")  # doctest: +SKIP
    """

    def __init__(
        self,
        student: Student,
        device: torch.device | str | None = None,
        size: str | None = None,
        frames: int | None = None,
    ) -> None:
        self.student, family = student, student.family
        if size is None and frames is None:
            self.family = family
        else:
            self.family = choose_size(trained_sizes(student.recipe, family), size, frames)
        self.phases = student.check_finished()
        cuda = student.recipe.runtime.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device(device if device is not None else "cuda" if cuda else "cpu")

    @classmethod
    def from_run(cls, folder: str | Path, **options: Any) -> Self:
        """Open a run's folder; ``options`` are the class's own.

        Raises:
            UserError: there is no run, or it is not finished.
        """
        return cls(Run(folder), **options)

    @classmethod
    def from_export(cls, folder: str | Path, base: str | None = None, **options: Any) -> Self:
        """Open what `raydmd export` wrote; ``options`` are the class's own.

        Args:
            folder: the export's.
            base: the base model's folder or ``hf://owner/name``; default: where the export says.

        Raises:
            UserError: there is no export, a part of it is missing or changed, or its base model is not at hand.
        """
        export = Export(folder, base)
        export.check()
        export.check_content()
        return cls(export, **options)

    @property
    def times(self) -> list[float]:
        """The student's step grid, from noise to 0."""
        return [self.phases[0].times[0], *(t for phase in self.phases for t in phase.times[1:])]

    @cached_property
    def experts(self) -> Experts:
        """The networks, on the device."""
        return self.student.experts_on(self.device)

    def conditions(self, prompt: str, given: str = "--prompt", image: Path | None = None) -> Conditions:
        """Return what the networks take of one prompt, tensors [1, ...].

        Args:
            prompt: the text.
            given: what the prompt is called in errors.
            image: the file of the first frame, of families from image to video.

        Raises:
            UserError: a prompt that the family does not know, or an image that it cannot take.
        """
        rows = from_text(self.student.recipe, self.family, prompt, 1, given, self.device, image)
        return {name: value.to(self.device) for name, value in self.family.for_size(rows).items()}

    def latents(
        self, conditions: Conditions, count: int, seed: int, start: int = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Return samples ``start`` to ``start + count - 1`` of a seed, latents [count, ...] on the device.

        Args:
            conditions: of one prompt, as `conditions` returns them.
            count: how many, in one batch.
            seed: of their noise.
            start: number of the first.
            on_step: told of each step: its number from 1, the time that it has reached, and the latents there.
        """
        rows = {name: value.expand(count, *value.shape[1:]) for name, value in conditions.items()}
        return sample_student(
            self.family, self.experts, self.phases, rows, count,
            seed=seed, start=start, solver=self.student.recipe.method.solver, device=self.device, on_step=on_step,
        ).latents.to(self.device)  # fmt: skip

    def decode(self, latents: Tensor, seed: int, start: int = 0) -> Tensor:
        """Return pictures [B, C, H, W] in [0, 1], videos [B, frames, C, H, W], or points [B, 2], in float32 on the CPU.

        Raises:
            RunError: one is not finite.
        """
        moving = self.family.frames > 1
        decoded = (self.family.decode_video(latents) if moving else self.family.decode(latents)).float().cpu()
        if not (finite := finite_samples(latents.cpu(), decoded)).all():
            what = f"{'video' if moving else 'picture'} {start + int((~finite).nonzero()[0])} of seed {seed}"
            raise RunError(f"{self.student.title}: {what} is not finite: the experts have diverged, or their precision "
                           f"is too small")  # fmt: skip
        return decoded

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 1,
        output_type: Output = "pil",
        image: str | Path | None = None,
        on_step: OnStep | None = None,
    ) -> Any:
        """Make ``num_images`` samples of each prompt.

        Args:
            prompt: one, or several.
            num_images: samples of each.
            seed: of their noise; sample I of a prompt has the noise of sample I of the seed.
            generator: draws the seed in its place.
            batch_size: samples that go through the networks at once; other than 1 may change their last bits.
            output_type: ``pil``, ``pt`` or ``latent``.
            image: the file of the first frame, of families from image to video.
            on_step: told of each step of each batch: its number from 1, the time that it has reached, and the latents
                [B, ...] there.

        Returns:
            ``pil``: a list of images, prompt by prompt; of a video, a list of its frames each; of points in the plane,
            one picture a prompt. ``pt``: a tensor of pictures [N, C, H, W] in [0, 1], videos [N, frames, C, H, W] or
            points [N, 2]. ``latent``: latents [N, ...].

        Raises:
            UserError: a prompt that the model does not know, or numbers below 1.
            RunError: a sample that is not finite.
        """
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} {value}: at least 1 is needed")
        if output_type not in ("pil", "pt", "latent"):
            raise UserError(f"output_type '{output_type}': one of pil, pt, latent")
        if generator is not None:
            seed = int(torch.randint(LARGEST_SEED, (), generator=generator, device=generator.device))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        made, pictures = list[Tensor](), list[Any]()
        frame = None if image is None else Path(image)
        for each in [self.conditions(text, "prompt", frame) for text in prompts]:
            parts = []
            for start in range(0, num_images, batch_size):
                latents = self.latents(each, min(batch_size, num_images - start), seed, start, on_step)
                parts.append(latents.cpu() if output_type == "latent" else self.decode(latents, seed, start))
            made.append(torch.cat(parts))
            if output_type == "pil":
                pictures += self._images(made[-1])
        return pictures if output_type == "pil" else torch.cat(made)

    def _images(self, decoded: Tensor) -> list[Image.Image] | list[list[Image.Image]]:
        if in_plane(self.family):
            return [scatter(decoded, size=512)]
        if self.family.frames > 1:
            return [[to_image(frame) for frame in video] for video in decoded]
        return [to_image(picture) for picture in decoded]
