"""What a run's folder offers to be served."""

import os
from dataclasses import dataclass
from pathlib import Path

from raydmd.errors import UserError
from raydmd.evaluation.prompts import own_prompts
from raydmd.evaluation.sizes import trained_sizes
from raydmd.runs.run import Run
from raydmd.serving.contract import Card, StepPlan
from raydmd.serving.settings import Serving


@dataclass(frozen=True)
class Offer:
    """What some weights offer.

    Attributes:
        card: what is told of them.
        shapes: of a sample's latents, for each size of the card.
        texts: which prompts they take: those, any, or those of a file.
    """

    card: Card
    shapes: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | bool | str | None

    @property
    def terms(self) -> tuple[object, ...]:
        """Weights that are alike in these can stand in for each other."""
        return self.card.kind, self.card.family, self.card.sizes, self.shapes, self.texts


def read_offer(serving: Serving, run: Run | None = None) -> Offer:
    """Return what a run's folder has to offer.

    Args:
        serving: the settings.
        run: the run, already open.

    Raises:
        UserError: no run, one that is not trained to its end, or one that makes no pictures.
    """
    run = run or Run(serving.run)
    card = read_card(serving, run)
    shapes = tuple(tuple(run.family.shape_for(*size)) for size in card.sizes)
    return Offer(card, shapes, card.prompts or run.family.reads_text or run.recipe.prompts.path)


def read_card(serving: Serving, run: Run | None = None) -> Card:
    """Return what is told of a run's folder; see `read_offer`.

    Raises:
        UserError: no run, one that is not trained to its end, or one that makes no pictures.
    """
    run = run or Run(serving.run)
    phases = run.trained_phases()
    if len(phases) < len(run.phases):
        raise UserError(f"run '{run.folder}' has experts for {len(phases)} of {len(run.phases)} phases: "
                        f"train it to its end")  # fmt: skip
    family = run.family
    if len(family.latent_shape) < 3:
        raise UserError(f"run '{run.folder}' makes points in the plane, not pictures: there is nothing to serve")
    trained = [each.picture_size for each in trained_sizes(run.recipe, family) if each.frames == family.frames]
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
        teacher_steps=(serving.teacher_steps or run.recipe.teacher.steps) if serving.teacher else None,
        guidance_scale=run.recipe.teacher.guidance_scale,
        frames=family.frames,
        fps=serving.fps,
        layout=serving.layout,
        revision=run.revision(),
        created=int(run.expert_file(0).stat().st_mtime),
        aliases=tuple(serving.aliases),
        negative_prompts=serving.teacher and family.reads_text and null_prompt,
        null_prompt=null_prompt,
    )


def experts_of(card: Card) -> int:
    """Return how many experts make the pictures."""
    return len({step.made_by for step in card.steps})
