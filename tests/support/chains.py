"""A method's derivatives, which roles hand from one to the next, against autograd through everything in one graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raydmd.diffusion.random import normal
from raydmd.methods.local import LocalProgram, make_pairs
from raydmd.methods.registry import build_method
from raydmd.runs.run import recipe_family
from raydmd.training.trainable_state import FlatParameters


class Captured(Exception):
    pass


def gradient_of_one_update(recipe: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[LocalProgram, Tensor]:
    """Run one iteration of a method in this process; return its parts, and the generator's gradient."""
    family = recipe_family(recipe)
    program = LocalProgram(build_method(recipe), family, family.load_teacher(), prompts(recipe.teacher.family))
    method = program.method
    if method.pairs:
        program.parts["generator"].pairs = make_pairs(
            method, family, program.parts["teacher"], prompts(recipe.teacher.family), method.pairs
        )
    for role in method.trained():
        program.parts[role].start_phase(0, 0)
    flat, taken = program.parts["generator"].flat, []
    step = FlatParameters.step

    def capturing(self: FlatParameters, gradients: list[Tensor], count: int, collective: Any) -> float:
        if self is flat:
            taken.append(sum(gradients[1:], gradients[0].clone()))
            raise Captured
        return step(self, gradients, count, collective)

    monkeypatch.setattr(FlatParameters, "step", capturing)
    with pytest.raises(Captured):
        method.iteration(program, 0, method.rollouts(program, 0))
    return program, taken[0]


def direct_gradient(program: LocalProgram, loss_of: Callable[..., Tensor]) -> Tensor:
    """Differentiate ``loss_of(x_s, x_t, t, conditions)`` [B] by the generator's weights, in one graph."""
    generator, recipe = program.parts["generator"], program.method.recipe
    generator.flat.gradient.zero_()
    draws = program.prompts(0, recipe.method.fake_updates)
    for batch in draws:
        proposal = generator.propose(0, batch)
        x_s, _ = generator._kept.pop(batch.start)
        phase, draw = generator.segment(proposal.batch_id.draw), proposal.batch_id.draw
        noise = normal(generator._key("score-noise", draw), batch.start, batch.count, program.family.latent_shape)
        x_t = program.family.schedule.diffuse(x_s, noise, proposal.t, phase.end)
        assert torch.allclose(x_t, proposal.x_t)
        (loss_of(x_s, x_t, proposal.t, proposal.conditions).sum() / recipe.batch.size).backward()
    return generator.flat.gradient.clone()


def same(one: Tensor, other: Tensor) -> bool:
    assert one.norm() > 0
    return bool((one - other).norm() < 2e-4 * other.norm())
