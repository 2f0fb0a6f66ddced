"""Classifier-free guidance with the conditional's norm, against QwenImagePipeline's own lines on packed latents."""

import pytest
import torch

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import plan_phases
from raydmd.models.diffusers.packing import pack, unpack
from raydmd.objectives.guidance import guided, with_norm_of
from raydmd.runs.run import recipe_family
from raydmd.sampling.limits import check_method

SHAPE = (2, 4, 8, 6)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_each_token_gets_the_conditionals_norm() -> None:
    conditional, unconditional = drawn(*SHAPE), drawn(*SHAPE) * 0.5 + 1
    made = guided(conditional, unconditional, 4.0)
    packed, whole = pack(made), pack(conditional)
    by_hand = packed * (whole.norm(dim=-1, keepdim=True) / packed.norm(dim=-1, keepdim=True))
    found = with_norm_of(conditional, made, (1, 2, 2))
    torch.testing.assert_close(found, unpack(by_hand, found.shape))
    of_pixels, of_samples = with_norm_of(conditional, made, (1, 1, 1)), with_norm_of(conditional, made, (1, 8, 6))
    for other in (of_pixels, of_samples, made):
        assert (found - other).abs().max() > 0.1


def test_a_videos_tokens_have_frames() -> None:
    conditional, made = drawn(1, 3, 4, 8, 6), 3 * drawn(1, 3, 4, 8, 6)
    found = with_norm_of(conditional, made, (2, 2, 2))
    for axis in (conditional, found):
        assert axis.shape == made.shape
    blocks = [x.unflatten(2, (2, 2)).unflatten(4, (4, 2)).unflatten(6, (3, 2)) for x in (conditional, found)]
    norms = [block.square().sum((1, 3, 5, 7)).sqrt() for block in blocks]
    torch.testing.assert_close(norms[0], norms[1])


def test_a_token_that_is_zero_stays_zero_and_half_precision_is_worked_in_float32() -> None:
    conditional, made = drawn(*SHAPE), drawn(*SHAPE)
    made[:, :, :2, :2] = 0
    found = with_norm_of(conditional, made, (1, 2, 2))
    assert found.isfinite().all() and not found[:, :, :2, :2].any()
    assert with_norm_of(conditional.bfloat16(), made.bfloat16(), (1, 2, 2)).dtype == torch.float32


def recipe(name: str) -> Recipe:
    return load_recipe(name, ["teacher.guidance_rescale=norm"])


def test_a_family_without_tokens_refuses_it() -> None:
    for name in ("ring", "digits"):
        family = recipe_family(recipe(name))
        phases = plan_phases(recipe(name), family.schedule.t_max)
        if name == "digits":
            check_method(recipe(name), family, phases)
            continue
        with pytest.raises(UserError, match="teacher.guidance_rescale: norm is that of a token's prediction.*'ring'"):
            check_method(recipe(name), family, phases)
