"""Adversarial and Fisher objectives in closed form, and the chains through roles against autograd in one graph."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chains import direct_gradient, gradient_of_one_update, same
from torch import Tensor

from raydmd.diffusion.schedule import EDM, RectifiedFlow, Schedule, VariancePreserving
from raydmd.diffusion.solvers import euler_step
from raydmd.errors import UserError
from raydmd.methods.local import LocalProgram
from raydmd.methods.registry import build_method
from raydmd.models.features import chosen_blocks, read_features
from raydmd.objectives.adversarial import AdversarialLoss, discriminator_loss, generator_loss
from raydmd.objectives.fisher import fisher_loss
from raydmd.runs.run import recipe_family
from raydmd.sampling.phase import segment_of
from raydmd.sampling.student import rollout

SCHEDULES = [RectifiedFlow(), VariancePreserving.scaled_linear(), EDM(1.0)]


def optimum(kind: AdversarialLoss, real: Tensor, generated: Tensor) -> Tensor:
    """The logits that are best where two densities are as given: found by descent on the expected loss."""
    logits = torch.zeros_like(real, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        on_real = discriminator_loss(logits[:, None], torch.full_like(logits, -9.0)[:, None], kind)
        on_generated = discriminator_loss(torch.full_like(logits, 9.0)[:, None], logits[:, None], kind)
        (real * on_real + generated * on_generated).sum().backward()
        optimizer.step()
    return logits.detach()


def test_the_best_discriminator_knows_the_densities() -> None:
    """Hinge: the sign of their difference (Lim & Ye 2017); softplus: the logarithm of their ratio."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    real, generated = (torch.exp(-0.5 * (x - mean).square()) for mean in (-0.5, 0.5))
    apart = (real - generated).abs() > 0.05
    hinge, logistic = optimum("hinge", real, generated), optimum("softplus", real, generated)
    assert (hinge - (real - generated).sign())[apart].abs().max() < 0.05
    assert (logistic - (real / generated).log()).abs().max() < 0.02
    swapped = optimum("hinge", generated, real)  # who takes one for the other finds its opposite
    assert (swapped + (real - generated).sign())[apart].abs().max() < 0.05


def test_the_generators_loss_falls_with_the_logit() -> None:
    logits = torch.tensor([[-1.0, 0.0], [2.0, 3.0]], requires_grad=True)
    for kind, slopes in (("hinge", torch.full((2, 2), -0.5)), ("softplus", -torch.sigmoid(-logits.detach()) / 2)):
        (gradient,) = torch.autograd.grad(generator_loss(logits, kind).sum(), logits)  # type: ignore[arg-type]
        assert torch.allclose(gradient, slopes)


def test_unknown_losses_are_refused() -> None:
    logits = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="wasserstein"):
        discriminator_loss(logits, logits, "wasserstein")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wasserstein"):
        generator_loss(logits, "wasserstein")  # type: ignore[arg-type]


# ---- SiD

MEAN, SPREAD = 1.5, 0.6  # of the teacher's x_s


def fisher_gradient(schedule: Schedule, s: float, t: float, theta: float, alpha: float, wrong: str = "") -> Tensor:
    """d L / d theta of each sample x_s = theta + SPREAD z against N(MEAN, SPREAD^2), the distance's share taken out."""
    z, eps = (torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    bridge = schedule.bridge(s, t)
    shift = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    x_s = shift + SPREAD * z
    x_t = bridge.alpha * x_s + bridge.sigma * eps
    variance = bridge.alpha**2 * SPREAD**2 + bridge.sigma**2
    seen = x_t.detach() if wrong == "not through the networks" else x_t
    teacher, fake = ((bridge.alpha * mean - seen) / variance for mean in (MEAN, theta))
    loss = fisher_loss(schedule, x_s, x_t, teacher, fake, t, s, "score", alpha)  # type: ignore[arg-type]
    with torch.no_grad():
        real = schedule.posterior_mean(teacher, x_t, t, "score", s)
        distance = (x_s - real).abs().flatten(1).mean(1) + 1e-6
    if wrong == "sign":
        loss = -loss
    return torch.stack([torch.autograd.grad(each, shift, retain_graph=True)[0] for each in loss * distance])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.3, 0.7)])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_fisher_gradient_of_a_shifted_gaussian(schedule: Schedule, s: float, t: float, alpha: float) -> None:
    """A - B = (MEAN - theta)(1 - K a) whatever x_t is, so that every sample's gradient is (theta - MEAN)(1 - K a)^2:
    half the divergence's own, for its first form gives none where the two spreads are one."""
    theta, bridge = -0.4, schedule.bridge(s, t)
    k = bridge.alpha * SPREAD**2 / (bridge.alpha**2 * SPREAD**2 + bridge.sigma**2)
    expected = ((theta - MEAN) * (1 - k * bridge.alpha) ** 2).expand(64)
    assert torch.allclose(fisher_gradient(schedule, s, t, theta, alpha), expected, rtol=1e-9)
    for wrong in ("sign", "not through the networks"):
        found = fisher_gradient(schedule, s, t, theta, alpha, wrong)
        assert (found - expected).abs().min() > 0.05 * expected.abs().max(), wrong


def test_at_the_optimal_fake_score_alpha_takes_off_the_divergence_itself() -> None:
    """The mean of L is (1 - alpha) E|A - B|^2: the score identity makes the rest nothing. The mean of x_0 in place of
    that of x_s, which is wrong where s > 0, does not."""
    schedule, s, t, theta = RectifiedFlow(), 0.3, 0.7, -0.4
    nodes = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bridge = schedule.bridge(s, t)
    x_s = theta + SPREAD * nodes[:, :1]
    x_t = bridge.alpha * x_s + bridge.sigma * nodes[:, 1:]
    variance = bridge.alpha**2 * SPREAD**2 + bridge.sigma**2
    teacher, fake = ((bridge.alpha * mean - x_t) / variance for mean in (MEAN, theta))
    apart = schedule.posterior_mean(teacher, x_t, t, "score", s) - schedule.posterior_mean(fake, x_t, t, "score", s)

    def mean_loss(alpha: float, at: float) -> float:
        loss = fisher_loss(schedule, x_s, x_t, teacher, fake, t, at, "score", alpha)  # type: ignore[arg-type]
        real = schedule.posterior_mean(teacher, x_t, t, "score", at)
        return float((loss * ((x_s - real).abs().mean(1) + 1e-6)).mean())

    for alpha in (0.0, 0.5, 1.0):
        assert mean_loss(alpha, s) == pytest.approx((1 - alpha) * float(apart.square().mean()), abs=0.01)
    assert abs(mean_loss(1.0, 0.0)) > 0.1


# ---- chains through roles


@pytest.mark.parametrize("family", ["ring", "digits"])
@pytest.mark.parametrize("phases", [1, 2])
def test_adm_follows_the_discriminator_through_the_fake_scores_step(
    quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, family: str, phases: int
) -> None:
    recipe = quick(family, "method.name=adm", f"method.phases={phases}", "method.adm.steps=2",
                   "method.score_margin=0.04", "method.discriminator.width=16")  # fmt: skip
    program, found = gradient_of_one_update(recipe, prompts, monkeypatch)
    fake, discriminator = program.parts["fake"], program.parts["discriminator"]
    schedule, dt = program.family.schedule, recipe.method.adm.dt
    weights = [parameter.grad.clone() for parameter in fake.network.parameters() if parameter.grad is not None]
    assert all(not weight.any() for weight in weights)  # the derivative by x_t has left them alone

    def loss(dt: float, sign: float = 1.0, cut: bool = False) -> Callable[..., Tensor]:
        def of(x_s: Tensor, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
            x = x_t
            for step in range(2):
                prediction = fake.predict(x.detach() if cut else x, t - step * dt, conditions)
                x = euler_step(schedule, prediction, x, t - step * dt, t - (step + 1) * dt, program.family.prediction)
            return sign * generator_loss(discriminator.logits(x, t - 2 * dt, conditions))

        return of

    assert same(found, direct_gradient(program, loss(dt)))
    for wrong in (loss(2 * dt), loss(dt, sign=-1.0), loss(dt, cut=True)):
        assert not same(found, direct_gradient(program, wrong))


@pytest.mark.parametrize("phases", [1, 2])
def test_sid_follows_the_divergence_through_both_networks(
    quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, phases: int
) -> None:
    recipe = quick("digits", "method.name=sid", f"method.phases={phases}", "teacher.guidance_scale=2")
    program, found = gradient_of_one_update(recipe, prompts, monkeypatch)
    fake, teacher = program.parts["fake"], program.parts["teacher"]

    def loss(scale: float = 2.0, alpha: float = 1.0, end: float | None = None) -> Callable[..., Tensor]:
        def of(x_s: Tensor, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
            real = teacher.predict(x_t, t, conditions, scale)
            s = program.parts["generator"].phase.end if end is None else end
            generated = fake.predict(x_t, t, conditions)
            return fisher_loss(program.family.schedule, x_s, x_t, real, generated, t, s, "flow", alpha)

        return of

    assert same(found, direct_gradient(program, loss()))
    for wrong in (loss(scale=1.0), loss(alpha=0.0)):
        assert not same(found, direct_gradient(program, wrong))


def test_dmd2_adds_the_classifiers_pull(quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference that the GAN makes to the generator's gradient is its loss's derivative, in one graph."""
    options = ["method.name=dmd2", "method.dmd2.references=16", "method.discriminator.width=16"]
    program, found = gradient_of_one_update(quick("digits", *options, "method.dmd2.generator_weight=0.5"), prompts,
                                            monkeypatch)  # fmt: skip
    monkeypatch.undo()
    _, without = gradient_of_one_update(quick("digits", *options, "method.dmd2.generator_weight=0"), prompts,
                                        monkeypatch)  # fmt: skip
    fake = program.parts["fake"]

    def loss(sign: float) -> Callable[..., Tensor]:
        def of(x_s: Tensor, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
            logits = fake.heads(read_features(fake.network, fake.blocks, x_t, t, conditions)[1])
            return 0.5 * generator_loss(sign * logits, "softplus")

        return of

    pull = found - without
    assert (pull - direct_gradient(program, loss(1.0))).norm() < 2e-3 * pull.norm()
    assert (pull - direct_gradient(program, loss(-1.0))).norm() > 0.1 * pull.norm()


def test_tdm_ends_at_every_step_and_sees_its_interval(quick: Any, prompts: Any) -> None:
    recipe = quick("ring", "method.name=tdm", "method.timestep_shift=2", "batch.size=64", "batch.micro=64")
    family = recipe_family(recipe)
    program = LocalProgram(build_method(recipe), family, family.load_teacher(), prompts("ring"))
    generator, fake = program.parts["generator"], program.parts["fake"]
    for part in (generator, fake):
        part.start_phase(0, 0)
    seen, times = set(), generator.phase.times
    for n in range(12):
        (batch,) = program.prompts(n, 2)
        proposal = generator.propose(n, batch)
        segment, other = (part.segment(proposal.batch_id.draw) for part in (generator, fake))
        assert segment == other
        step = segment.steps
        low, high = times[step], times[step - 1]
        assert segment.end == low and low < proposal.t.min() and proposal.t.max() <= high
        seen.add(step)
        x_s, _ = generator._kept.pop(0)
        whole = replace(generator.phase, times=times[: step + 1])
        key = generator._key("rollout", proposal.batch_id.draw)
        expected = rollout(family, generator.experts, [whole], key, 0, {}, 64)  # the student's own latents there
        assert torch.equal(x_s, expected)
        assert len(segment.times) == step + 1
    assert seen == {1, 2, 3, 4}
    nested = quick("ring", "method.name=tdm", "method.score_interval=nested").method
    assert segment_of(generator.phase, 3, nested).score_high == 1.0


def test_blocks_are_named(quick: Any) -> None:
    network = recipe_family(quick("digits")).load_teacher()
    assert chosen_blocks(network, None, "key") == ["blocks.0"]
    with pytest.raises(UserError, match=r"key: the network has no block 'blocks.9'; did you mean 'blocks.0'\?"):
        chosen_blocks(network, ["blocks.9"], "key")
