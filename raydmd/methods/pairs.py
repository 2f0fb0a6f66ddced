"""A recipe's ODE pairs in a folder: what they are, whether a folder has them, reading them."""

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.pair_shards import KEY, PairFacts, ShardedPairs, check_pairs
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.methods.registry import build_method
from raydmd.models.base import Family
from raydmd.models.fingerprint import fingerprint_teacher


def pair_facts(recipe: Recipe, family: Family, prompts: PromptTable | None) -> PairFacts:
    """Return what determines a recipe's pairs; without prompts, those are left open.

    Raises:
        UserError: there is no teacher, or a row of the prompts cannot be used.
    """
    teacher = recipe.teacher
    return PairFacts(
        family=family.name,
        teacher=fingerprint_teacher(family),
        guidance_scale=teacher.guidance_scale,
        guidance_rescale=teacher.guidance_rescale or family.guidance_rescale,
        steps=teacher.steps,
        times=tuple(family.teacher_times(teacher.steps, teacher.timestep_shift, family.latent_shape)),
        dtype=str(family.options.get("dtype", "float32")),
        latent_shape=tuple(family.latent_shape),
        seed=recipe.seed,
        prompts=None if prompts is None else prompts.identity(),
        inputs=", ".join(f"{name} {value:g}" for name, value in family.constant_inputs.items()),
    )


def check_run_pairs(recipe: Recipe, family: Family, prompts: PromptTable | None) -> None:
    """Refuse a ``pairs.path`` that has not, to the bit, what the run's teacher would make.

    Args:
        recipe: the run's recipe, with its teacher's place.
        family: the kind of network.
        prompts: the family's ``condition_columns`` of the prompts; None: they are not here, and not compared.

    Raises:
        UserError: ``pairs.path: ...`` (`raydmd.data.pair_shards.check_pairs`).
    """
    count = build_method(recipe).pairs
    if recipe.pairs.path is None or not count:
        return
    if recipe.teacher.path is None:
        raise UserError(f"{KEY}: pairs are of one teacher, and the recipe names none; give teacher.path, as of "
                        f"`raydmd pretrain`")  # fmt: skip
    check_pairs(recipe.pairs.path, pair_facts(recipe, family, prompts), count)


def folder_pairs(recipe: Recipe, device: torch.device | str = "cpu") -> ShardedPairs | None:
    """Return the pairs of ``pairs.path`` that the recipe's method takes; None where it takes none, or no path is given.

    Raises:
        UserError: the folder is not there, as this machine sees it.
    """
    count = build_method(recipe).pairs
    return ShardedPairs(recipe.pairs.path, count, device) if recipe.pairs.path is not None and count else None
