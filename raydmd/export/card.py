"""The model card of an export: what it is, how it was made, what was measured, and how it is used."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raydmd.atomic import write_text, writing
from raydmd.evaluation.sizes import size_words, trained_sizes
from raydmd.export.formats import FORMATS
from raydmd.export.loading_code import call_code, pipeline_arguments
from raydmd.export.pipeline_folder import absent_parts
from raydmd.export.plan import Plan
from raydmd.models.base import IMAGE_COLUMN
from raydmd.models.diffusers.hub import HUB
from raydmd.models.diffusers.prompts_by_pipeline import NEGATIVE
from raydmd.models.diffusers.student_sampler import FLOW_MAP

CARD = "README.md"
PICTURES = 2  # at most
LEFT_OUT = ("runtime", "checkpoint", "monitor", "storage", "plugins")  # of the recipe
ROWS = 40  # of measured figures, at most
LICENSE = "other # yours to say: the base model's licence, and that of the prompts, may bind it"


def write_card(plan: Plan, folder: Path, name: str) -> None:
    """Write README.md and copy the run's newest pictures.

    Args:
        plan: of the export.
        folder: of the export.
        name: of the folder as it will be, which the example loads.

    Raises:
        StorageError: the disk is full or gone.
    """
    pictures = _copy_pictures(plan, folder)
    write_text(folder / CARD, "\n".join(_lines(plan, name, pictures)) + "\n")


def _lines(plan: Plan, name: str, pictures: Sequence[str]) -> Iterator[str]:
    recipe, count = plan.run.recipe, len(plan.times) - 1
    method, experts = recipe.method, recipe.method.experts
    yield "---"
    yield f"license: {LICENSE}"
    yield f"base_model: {json.dumps(plan.base)}"
    yield f"library_name: {'peft' if plan.format == 'peft' else 'diffusers'}"
    begins = "image" if _takes_picture(plan) else "text"
    yield f"pipeline_tag: {begins}-to-{'video' if plan.family.frames > 1 else 'image'}"
    yield "tags: [few-step, distillation, raydmd" + (", lora]" if plan.format != "diffusers" else "]")
    yield "---"
    yield ""
    yield f"# {name}"
    yield ""
    steps = "1 step" if count == 1 else f"{count} steps"
    many = "one expert" if len(plan.phases) == 1 else f"{len(plan.phases)} experts"
    kind = f"LoRA adapters of rank {experts.rank} and alpha {experts.alpha:g}" if plan.is_lora else "whole networks"
    yield f"A student of `{plan.base}` that samples in {steps}, distilled with raydmd: {many}, {kind}."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| method | {method.name} |"
    yield f"| times | {', '.join(f'{t:.4g}' for t in plan.times[:-1])} |"
    for phase, expert in zip(plan.phases, plan.names, strict=True):
        yield f"| {expert} | from {phase.times[0]:.4g} to {phase.end:.4g}, {phase.steps} of the steps |"
    sizes = [size_words(sized) for sized in trained_sizes(recipe, plan.family)]
    yield f"| trained at | {', '.join(sizes)} in pixels |"
    yield f"| teacher's guidance | {recipe.teacher.guidance_scale:g}; the student takes none |"
    yield f"| weights | {plan.dtype} |"
    yield ""
    yield "## Use"
    yield ""
    yield "```python"
    code = FORMATS[plan.format].code(plan)
    imports, _, rest = code.partition("\n\n")
    yield imports
    if _takes_picture(plan):
        yield "from diffusers.utils import load_image"
    yield ""
    yield f"folder = {json.dumps(name)}  # or OWNER/NAME on the hub"
    if plan.format != "diffusers":
        yield f"base = {json.dumps(plan.base)}" + ("" if _on_hub(plan) else "  # where the teacher's folder lies")
    yield f"dtype = torch.{plan.dtype if plan.format == 'diffusers' else 'bfloat16'}"
    yield ""
    yield rest.rstrip("\n")
    yield ""
    moving = plan.family.frames > 1
    what = ("video", "frames") if moving else ("image", "images")
    yield f"{what[0]} = {call_code(plan, _prompt(plan), 'switch(' in code)}.{what[1]}[0]"
    yield "```"
    yield ""
    yield from _remarks(plan)
    yield ""
    if figures := _figures(plan):
        yield "## Measured"
        yield ""
        yield "| | |"
        yield "|---|---|"
        for key, value in figures[:ROWS]:
            yield f"| {key} | {value:.4g} |"
        yield ""
    for picture in pictures:
        yield f"![samples]({picture})"
        yield ""
    yield "## Recipe"
    yield ""
    yield "```yaml"
    yield yaml.safe_dump(_recipe(plan), sort_keys=False).rstrip()
    yield "```"


def _recipe(plan: Plan) -> dict[str, Any]:
    """Return what made the weights of the recipe: no paths of this machine, and not where it ran."""
    tree = plan.run.recipe.model_dump(mode="json", exclude_defaults=True)
    kept = {key: value for key, value in tree.items() if key not in LEFT_OUT}
    for section in kept.values():
        if isinstance(section, dict) and isinstance(path := section.get("path"), str) and not path.startswith(HUB):
            section["path"] = Path(path).name
    return kept


def _prompt(plan: Plan) -> list[str]:
    """Return the pipeline's arguments that a prompt is: a text, or embeddings where there is no text encoder."""
    picture = ['image=load_image("first_frame.png")'] if _takes_picture(plan) else []
    if "text_encoder" not in absent_parts(plan):
        return [*picture, f'{"prompt=" if picture else ""}"a red fox in the snow"']
    taken = pipeline_arguments(plan)
    columns = [name for name in plan.family.condition_columns if name in taken and not name.startswith(NEGATIVE)]
    return [*picture, ", ".join(f"{name}={name}" for name in columns)]


def _takes_picture(plan: Plan) -> bool:
    """Whether a sample begins with a picture."""
    return IMAGE_COLUMN in plan.family.condition_columns


def _remarks(plan: Plan) -> Iterator[str]:
    yield "- The steps and their times are those of the training: other numbers of steps, or guidance, do not fit it."
    if plan.sampler.scheduler == FLOW_MAP:
        yield (f"- {FLOW_MAP} makes the trained steps exactly; an older diffusers does not have it, and an export "
               f"made with that one has others.")  # fmt: skip
    if plan.sampler.sigmas:
        yield (f"- No {plan.sampler.scheduler} has the trained times by itself: the line on `set_timesteps` gives them "
               f"to it.")  # fmt: skip
    if plan.boundary_ratio is not None:
        yield f"- `boundary_ratio` {plan.boundary_ratio:.4g} lies between the times of the two networks."


def _figures(plan: Plan) -> list[tuple[str, float]]:
    """Return the numbers of the run's evaluation.json by their keys, dotted; none where there is none."""
    try:
        tree = json.loads((plan.run.folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return list(_numbers(tree, ""))


def _numbers(tree: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            yield from _numbers(part, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield key, float(tree)


def _copy_pictures(plan: Plan, folder: Path) -> list[str]:
    """Copy the newest pictures of the run's samples; return their names in the export."""
    found = sorted((plan.run.folder / "samples").glob("*.png"), key=lambda file: (file.stat().st_mtime, file.name))
    names = []
    for file in found[-PICTURES:]:
        with writing(folder / file.name):
            shutil.copyfile(file, folder / file.name)
        names.append(file.name)
    return names


def _on_hub(plan: Plan) -> bool:
    return str(plan.run.recipe.teacher.path).startswith(HUB)
