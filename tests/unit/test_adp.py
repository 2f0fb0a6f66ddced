"""ADP: what the student is trained on, and its gradient through the latent discriminator, in one graph."""

from typing import Any

import pytest
import torch
from chains import gradient_of_one_update, same
from torch import Tensor

from raydmd.diffusion.random import Key, normal, uniform
from raydmd.methods.local import train
from raydmd.methods.program import trace_method
from raydmd.objectives.adversarial import generator_loss
from raydmd.runs.run import recipe_family

ADP = ["method.name=adp", "method.adp.pairs=64", "method.discriminator.width=16"]


def test_times_are_cubic_and_latents_are_between_the_pairs_ends(
    quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """t = 1 - u^3 lies mostly near the noise, where the one step begins: its mean is 3/4, not 1/4."""
    recipe = quick("digits", *ADP, "batch.size=512", "batch.micro=512", "method.adp.pairs=512")
    run, _ = gradient_of_one_update(recipe, prompts, monkeypatch)
    generator = run.parts["generator"]
    (batch,) = run.prompts(0, 0)
    restored = generator.restore(0, batch)
    _, proposal = generator._kept[0]
    u = uniform(generator._key("restore-t", restored.batch_id.draw), 0, 512)
    assert torch.allclose(proposal.t, 1 - u**3)
    assert float(proposal.t.mean()) == pytest.approx(0.75, abs=0.03)
    noise, real, _ = generator.take_pairs("regression", 0, 512)
    t = proposal.t.float().reshape(-1, 1, 1, 1)
    assert torch.equal(restored.real, real)
    assert torch.allclose(proposal.x_t, (1 - t) * real + t * noise, atol=1e-6)


@pytest.mark.parametrize("weight", [0.85, 2.0])
def test_the_generator_follows_the_latent_discriminator(
    quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    recipe = quick("digits", *ADP, f"method.adp.latent_weight={weight}")
    run, found = gradient_of_one_update(recipe, prompts, monkeypatch)
    generator, latent = run.parts["generator"], run.parts["latent"]
    schedule, method = run.family.schedule, recipe.method

    def direct(sign: float = 1.0, clean: bool = False, factor: float = weight) -> Tensor:
        generator.flat.gradient.zero_()
        for batch in run.prompts(0, 0):
            restored = generator.restore(0, batch)
            x_0, _ = generator._kept.pop(batch.start)
            latents = latent.shown(restored, restored.x, "vjp")  # for its times
            key = Key(recipe.seed, latent.phase.index, "latent-vjp-noise", restored.batch_id.draw)
            noise = normal(key, batch.start, batch.count, run.family.latent_shape)
            x_t = x_0 if clean else schedule.diffuse(x_0, noise, latents.t)
            logits = latent.logits(x_t, latents.t, restored.conditions)
            (sign * factor * generator_loss(logits).sum() / recipe.batch.size).backward()
        return generator.flat.gradient.clone()

    assert not method.regression.weight
    assert same(found, direct())
    for wrong in (direct(sign=-1.0), direct(clean=True), direct(factor=1.5 * weight)):
        assert not same(found, wrong)


def test_it_has_no_fake_score_and_trains_both(quick: Any, prompts: Any) -> None:
    recipe = quick("digits", *ADP, "iterations=4")
    assert trace_method(recipe).method.trained() == ["generator", "latent"]
    family, figures = recipe_family(recipe), []
    run = train(
        recipe, family, family.load_teacher(), prompts("digits"), on_iteration=lambda n, made: figures.append(made)
    )
    assert set(run.parts) == {"generator", "latent", "teacher"} and len(figures) == 4
    for made in figures:
        ((stats,), (judged,)) = made["generator"], made["latent"]
        assert stats.norm > 0 and judged.norm > 0 and not stats.zeroed
        assert all(0 <= row["loss_latent"] < 10 for _, row in judged.micro)
