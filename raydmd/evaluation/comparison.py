"""What a report sets side by side: runs on one teacher, and the keys in which their recipes differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.models.fingerprint import REVISION
from raydmd.runs.run import Run

ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """A key of the recipe by its path, and each run's value in words."""

    key: str
    values: list[str]


def teacher_of(run: Run) -> str:
    """Return what tells a run's teacher from others: its weights' fingerprint, or its path if it cannot be read."""
    try:
        return run.fingerprint().partition(REVISION)[0]
    except UserError:
        return str(run.recipe.teacher.path)


def by_teacher(runs: Sequence[Run]) -> list[list[int]]:
    """Return the runs' numbers in groups that share pictures and figures, in the order given.

    Runs of a group have a teacher of the same weights, wherever it lies, sampled with the same guidance and steps, and
    the same prompts and shape.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, run in enumerate(runs):
        teacher, shape = run.recipe.teacher, run.family.latent_shape
        rescale = teacher.guidance_rescale or run.family.guidance_rescale
        sampled = teacher.family, teacher.guidance_scale, rescale, teacher.steps, teacher.timestep_shift
        key = (teacher_of(run), *sampled, shape, run.recipe.prompts.path)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Return the keys whose values are not the same in all recipes.

    Left out: the teacher's path where the teacher is one, and a method's own options that are as they are by default
    where another method has none of the kind.
    """
    trees = [flattened(run.recipe) for run in runs]
    everywhere = set.intersection(*(set(tree) for tree in trees))
    trees = [
        {key: value for key, value in tree.items() if key in everywhere or value != usual.get(key, ABSENT)}
        for tree, usual in zip(trees, (_usual_options(run.recipe) for run in runs), strict=True)
    ]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    same_teacher = len({teacher_of(run) for run in runs}) == 1
    found = []
    for key in keys:
        values = [_in_words(tree[key]) if key in tree else ABSENT for tree in trees]
        if len(set(values)) > 1 and not (key == "teacher.path" and same_teacher):
            found.append(Difference(key, values))
    return found


def flattened(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by the path of their key, as ``method.name``."""

    return _by_path(recipe.model_dump(mode="json"), "")


def _by_path(tree: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _by_path(value, f"{path}{key}.") if isinstance(value, dict) and value else {path + key: value}
    return found


def _usual_options(recipe: Recipe) -> dict[str, Any]:
    """Return a method's options by default, by the path of their key."""
    return _by_path(type(recipe.method)(name=recipe.method.name).model_dump(mode="json"), "method.")


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_in_words(part) for part in value)}]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
