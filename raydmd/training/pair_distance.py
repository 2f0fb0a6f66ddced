"""How far a student's result is from the teacher's on the same noise, by pixels (DMD Eq. 9)."""

from collections.abc import Callable

from torch import Tensor, nn

from raydmd.config.recipe import Recipe
from raydmd.models.base import Family
from raydmd.models.perceptual.imagenet import is_here
from raydmd.models.perceptual.lpips import MODELS, PerceptualDistance

DISTANCE, NETWORK = "method.regression.distance", "method.regression.network"
PairDistance = Callable[[Tensor, Tensor], Tensor]  # of student and teacher, [B, ...] each, to [B]


class PixelDistance(nn.Module):
    """LPIPS of decoded samples; a video's is the mean over its frames.

    Args:
        recipe: the run's recipe.
        family: the kind of network, which decodes.

    Raises:
        UserError: the family has no pixels, or LPIPS' weights are not there.
    """

    def __init__(self, recipe: Recipe, family: Family) -> None:
        super().__init__()
        family.check_pixels(DISTANCE)
        self.family, self.distance = family, PerceptualDistance(recipe.method.regression.network, NETWORK)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distances [B] of latents [B, ...]; it can be differentiated by both."""
        one, other = (self.family.to_pixels(latents).flatten(0, 1) for latents in (student, teacher))
        distances: Tensor = self.distance(one, other)
        return distances.reshape(len(student), -1).mean(1)


def check_distance(recipe: Recipe, family: Family, hub: bool) -> list[str]:
    """Refuse, before a run, a distance that could not be measured; return what only the hub can tell.

    Args:
        recipe: the run's recipe.
        family: its kind of network.
        hub: whether weights that are not on this machine are fetched.

    Raises:
        UserError: as `PixelDistance`.
    """
    regression = recipe.method.regression
    if regression.distance != "lpips":
        return []
    family.check_pixels(DISTANCE)
    if not hub and not is_here(MODELS[regression.network]):
        return [f"{NETWORK}: the ImageNet weights of {MODELS[regression.network]} are not on this machine"]
    PixelDistance(recipe, family)
    return []
