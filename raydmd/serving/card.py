"""What the folder of a run or an export offers to be served."""

import os
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError
from raydmd.evaluation.prompts import own_prompts
from raydmd.evaluation.sizes import trained_sizes
from raydmd.export.exported import open_student
from raydmd.models.encoding import encodes_first_frames
from raydmd.runs.student import Student
from raydmd.serving.contract import Card, FirstFrame, StepPlan
from raydmd.serving.settings import Serving


@dataclass(frozen=True)
class Offer:
    """What some weights offer.

    Attributes:
        card: what is told of them.
        shapes: of a sample's latents, for each size of the card.
        texts: which prompts they take without a first frame: those, any, or those of a file; None: none.
    """

    card: Card
    shapes: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | bool | str | None

    @property
    def terms(self) -> tuple[object, ...]:
        """Weights that are alike in these can stand in for each other."""
        return self.card.kind, self.card.family, self.card.sizes, self.shapes, self.texts, self.card.first_frame


def open_served(serving: Serving, resolve: bool = False) -> Student:
    """Open the folder that is to be served.

    Args:
        serving: the settings.
        resolve: open where a link points now, so that all of it is read there though the link is pointed elsewhere.

    Raises:
        UserError: neither a run nor an export.
    """
    return open_student(os.path.realpath(serving.run) if resolve else serving.run, serving.base, serving.teacher)


def read_offer(serving: Serving, student: Student | None = None) -> Offer:
    """Return what a folder has to offer.

    Args:
        serving: the settings.
        student: what is in the folder, already open.

    Raises:
        UserError: no run, one that is not trained to its end, or one that makes no pictures.
    """
    student = student or open_served(serving)
    card, family = read_card(serving, student), student.family
    shapes = tuple(tuple(family.shape_for(*size)) for size in card.sizes)
    any_text = family.reads_text or not family.condition_columns
    return Offer(card, shapes, card.prompts or any_text or student.recipe.prompts.path)


def read_card(serving: Serving, student: Student | None = None) -> Card:
    """Return what is told of a folder; see `read_offer`.

    Raises:
        UserError: no run, one that is not trained to its end, or one that makes no pictures.
    """
    student = student or open_served(serving)
    phases, family, teacher = student.check_finished(), student.family, student.recipe.teacher
    if serving.teacher:
        _ = student.teacher_family  # refused now, if there is none
    if len(family.latent_shape) < 3:
        raise UserError(f"{student.title} makes points in the plane, not pictures: there is nothing to serve")
    trained = [each.picture_size for each in trained_sizes(student.recipe, family) if each.frames == family.frames]
    sizes = tuple(dict.fromkeys((*trained, *serving.sizes)))
    for size in sizes:
        family.shape_for(*size)
    null_prompt = family.options.get("null_prompt", True)
    return Card(
        name=serving.name or Path(os.path.abspath(serving.run)).name,  # of the link, not of what it points at
        kind="video" if family.frames > 1 else "image",
        family=family.name,
        sizes=sizes,
        prompts=own_prompts(family),
        steps=tuple(
            StepPlan(f"expert-{phase.index + 1}", phase.times[i], phase.times[i + 1])
            for phase in phases
            for i in range(phase.steps)
        ),
        teacher_steps=(serving.teacher_steps or teacher.steps) if serving.teacher else None,
        guidance_scale=teacher.guidance_scale,
        frames=family.frames,
        fps=serving.fps,
        layout=serving.layout,
        revision=student.revision(),
        created=int(student.files(0)[0].stat().st_mtime),
        aliases=tuple(serving.aliases),
        negative_prompts=serving.teacher and family.reads_text and null_prompt,
        null_prompt=null_prompt,
        export=student.format,
        first_frame=_first_frame(student),
    )


def _first_frame(student: Student) -> FirstFrame:
    if not encodes_first_frames(student.family):
        return "none"
    return "required" if student.recipe.prompts.path is None else "optional"


def experts_of(card: Card) -> int:
    """Return how many experts make the pictures."""
    return len({step.made_by for step in card.steps})
