"""Which size each global batch of a run is of: drawn by its number alone, and what a family is at that size."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from raydmd.config.buckets import KEY
from raydmd.config.recipe import Bucket, Recipe
from raydmd.diffusion.random import Key, uniform
from raydmd.errors import UserError
from raydmd.models.base import Family, bucket_column


def draw_bucket(seed: int, draw: int, weights: Sequence[float]) -> int:
    """Return the number of the bucket that a global batch is of, drawn by the weights.

    It depends on nothing else: whoever asks, whenever, in whatever phase, gets the same.

    Args:
        seed: the run's.
        draw: the batch's number in the run, as `raydmd.training.messages.BatchId.draw`.
        weights: of the buckets, each above 0.
    """
    ends = list(accumulate(weights))
    at = float(uniform(Key(seed, 0, "bucket", draw), 0, 1)[0]) * ends[-1]
    return min(bisect_right(ends, at), len(ends) - 1)


def draws_of(recipe: Recipe) -> int:
    """Return how many global batches an iteration draws: one for each of the fake score's updates, and one more."""
    return recipe.method.fake_updates + 1


class Buckets:
    """The sizes of a run's samples, each as the family of samples of that size.

    Without ``prompts.buckets`` there is one, the family as it is.

    Args:
        recipe: the run's recipe.
        family: its family.

    Attributes:
        families: one a bucket, in the recipe's order; their networks and weights are the family's.

    Raises:
        UserError: ``prompts.buckets...: ...``: a size that the family does not make, or has twice.
    """

    def __init__(self, recipe: Recipe, family: Family) -> None:
        given = self.given = recipe.prompts.buckets or ()
        self.seed, self.weights = recipe.seed, [bucket.weight for bucket in given] or [1.0]
        self.draws = draws_of(recipe)
        self.families = [_resized(family, number, bucket) for number, bucket in enumerate(given)] or [family]
        shapes = self.shapes
        for number, shape in enumerate(shapes):
            if (first := shapes.index(shape)) < number:
                raise UserError(f"{KEY}.{number}: {list(given[number].size)} is the size of {KEY}.{first}, "
                                f"{list(given[first].size)}")  # fmt: skip

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The latents' shapes of a sample."""
        return [tuple(family.latent_shape) for family in self.families]

    def by_column(self) -> dict[str, Family]:
        """Return the families of the recipe's buckets by the column of prompts that has pictures at their size."""
        return {bucket_column(bucket.size): family for bucket, family in zip(self.given, self.families, strict=False)}

    def family(self, draw: int) -> Family:
        """Return the family at the size that a global batch is of, by its number in the run."""
        return self.families[draw_bucket(self.seed, draw, self.weights) if len(self.families) > 1 else 0]

    def family_of(self, iteration: int, update: int) -> Family:
        """Return the family at the size that a global batch is of, by its number in an iteration."""
        return self.family(iteration * self.draws + update)

    def largest(self) -> Family:
        """Return the family at the size of the most latents."""
        return max(self.families, key=lambda family: math.prod(family.latent_shape))

    def least(self) -> tuple[int, ...]:
        """Return the shape whose sides are each the shortest that a bucket has."""
        return tuple(min(sides) for sides in zip(*self.shapes, strict=True))


def check_buckets(recipe: Recipe, family: Family, pairs: int) -> None:
    """Refuse buckets that the teacher or the method cannot have; where there is a teacher, it has been checked.

    Args:
        recipe: the run's recipe.
        family: its family.
        pairs: ODE pairs that its method needs.

    Raises:
        UserError: ``prompts.buckets...: ...``, or that ``teacher.options.latent_shape`` is no bucket's.
    """
    if recipe.prompts.buckets is None:
        return
    if pairs:
        raise UserError(f"{KEY}: method '{recipe.method.name}' trains on ODE pairs here, which are all of one size; "
                        f"leave buckets out, or what needs pairs")  # fmt: skip
    buckets = Buckets(recipe, family)
    for number, (bucket, sized) in enumerate(zip(recipe.prompts.buckets, buckets.families, strict=True)):
        try:
            sized.check_latents()
        except UserError as error:
            words = str(error).removeprefix("teacher.options.latent_shape: ")
            raise UserError(f"{KEY}.{number}: {list(bucket.size)}: {words}") from None
    if tuple(family.latent_shape) not in buckets.shapes:
        raise UserError(f"teacher.options.latent_shape: {list(family.latent_shape)}, the size of previews and of what "
                        f"is made without a size, is none of {KEY}; give one of theirs, e.g. "
                        f"{list(buckets.shapes[0])}")  # fmt: skip


def _resized(family: Family, number: int, bucket: Bucket) -> Family:
    try:
        return family.resized(family.sample_shape(bucket.frames, *bucket.sides))
    except UserError as error:
        raise UserError(f"{KEY}.{number}: {list(bucket.size)}: {str(error).removeprefix('sizes: ')}") from None
