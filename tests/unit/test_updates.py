"""The generator's and the fake score's updates, held against formulas written out by hand."""

import pytest
import torch
from torch import Tensor

from raydmd.data.row_order import RowGroup, RowOrder
from raydmd.data.trajectories import Pairs
from raydmd.diffusion.random import Key, normal, uniform
from raydmd.methods.registry import plan_phases
from raydmd.objectives.score_matching import score_matching_loss
from raydmd.runs.run import recipe_family
from raydmd.sampling.student import exit_step, rollout
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import PromptBatch, Score
from raydmd.training.teacher import Scorer

# ---------------------------------------------------------------- the generator's update


class Capture:
    """A collective of one that keeps what is summed."""

    def sum_(self, tensor: Tensor) -> Tensor:
        self.total = tensor.clone()
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        return tensor


def proposed(quick, *overrides: str, phase: int = 0) -> tuple[Generator, list, list[Score], list[Score]]:
    recipe = quick("ring", "method.name=phased", *overrides)
    family = recipe_family(recipe)
    generator = Generator(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max))
    generator.start_phase(0, 0)
    generator.start_phase(phase, 0)
    micro = recipe.batch.micro or recipe.batch.size
    proposals = [generator.propose(0, PromptBatch(start, micro, {})) for start in range(0, recipe.batch.size, micro)]
    scorer = Scorer(recipe, family, family.load_teacher())
    real = [scorer.score(proposal) for proposal in proposals]
    fake = [Score(s.batch_id, s.prediction + 0.3 * torch.sin(7 * p.x_t)) for s, p in zip(real, proposals, strict=True)]
    return generator, proposals, real, fake


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("weight", ["normalized", "raw"])
def test_the_gradient_is_that_of_the_formula(quick, phase: int, weight: str) -> None:
    generator, (proposal,), (real,), (fake,) = proposed(
        quick, "batch.micro=null", f"method.gradient_weight={weight}", phase=phase
    )
    s = generator.phase.end
    x_s = generator._kept[0][0]
    t, x_t, x = proposal.t[:, None], proposal.x_t.double(), x_s.detach().double()
    assert s == (0.5 if phase == 0 else 0.0) and float(t.min()) > s + 0.02 - 1e-12
    assert proposal.batch_id.draw == generator.draws - 1  # after the fake's draws of the iteration
    assert not torch.allclose(generator.rollout(0, 0, PromptBatch(0, 16, {})).x_s, x_s, atol=1e-2)

    bridge_alpha = (1 - t) / (1 - s)
    noise = normal(Key(0, phase, "score-noise", proposal.batch_id.draw), 0, 16, (2,)).double()
    assert torch.allclose(x_t, bridge_alpha * x + (t**2 - bridge_alpha**2 * s**2).sqrt() * noise, atol=1e-5)
    if weight == "raw":  # Phased DMD Eq. 11: w (T - F)
        w = bridge_alpha / (t + t**2 / (1 - t).clamp(min=1e-300))
        gradient = w * (real.prediction.double() - fake.prediction.double())
    else:

        def mean_x_s(v: Tensor) -> Tensor:  # (x_t + sig_{t|s}^2 score) / a_{t|s}
            score = -(v + x_t / (1 - t)) / (t + t**2 / (1 - t))
            return (x_t + (t**2 - bridge_alpha**2 * s**2) * score) / bridge_alpha

        m_real, m_fake = mean_x_s(real.prediction.double()), mean_x_s(fake.prediction.double())
        gradient = (m_fake - m_real) / (x - m_real).abs().mean(1, keepdim=True)
    generator.flat.gradient.zero_()
    expected = torch.autograd.grad(
        (x_s * gradient.float()).sum() / x_s.numel(), list(generator.experts.trainable_parameters().values()),
        retain_graph=True,
    )  # fmt: skip
    capture = Capture()
    stats = generator.update([real], [fake], collective=capture)
    flat = torch.cat([part.reshape(-1) for part in expected])
    assert torch.allclose(capture.total, flat, rtol=1e-3, atol=1e-6 * float(flat.abs().max()) + 1e-9)
    assert float(flat.norm()) > 1e-4 and stats.norm == pytest.approx(float(flat.norm()), rel=1e-3)
    assert stats.version == generator.updates == generator.flat.version == 1
    assert stats.micro[0][0] == 0
    assert stats.micro[0][1]["dm_gradient"] == pytest.approx(float(gradient.abs().mean()), rel=1e-3)


def test_a_step_goes_toward_the_teachers_mean(quick) -> None:
    """With a fake score that knows x_s, the step goes to E_teacher[x_0 | x_t]; with the two exchanged, away from it."""

    def came_nearer(exchanged: bool) -> float:
        generator, (proposal,), (real,), _ = proposed(quick, "batch.micro=null", phase=1)
        x_s, t = generator._kept[0][0].detach(), proposal.t[:, None].float()
        target = proposal.x_t - t * real.prediction
        honest = Score(real.batch_id, (proposal.x_t - x_s) / t)
        generator.update([honest], [real]) if exchanged else generator.update([real], [honest])
        draw = proposal.batch_id.draw
        again = rollout(
            generator.family, generator.experts, generator.phases, Key(0, 1, "rollout", draw), 0, {}, 16,
            leave=exit_step(generator.phase, Key(0, 1, "exit", draw)),
        )  # fmt: skip
        return float(((x_s - target).abs() - (again - target).abs()).mean())

    assert came_nearer(exchanged=False) > 0 > came_nearer(exchanged=True)


def test_one_samples_distance_does_not_set_anothers_step(quick) -> None:
    """Sample 0's scores agree, so it adds nothing, however far the teacher is from it; a batch's mean would show."""
    totals = []
    for far in (0.0, 50.0):
        generator, _, (real,), (fake,) = proposed(quick, "batch.micro=null")
        a, b = real.prediction.clone(), fake.prediction.clone()
        a[0] += far
        b[0] = a[0]
        capture = Capture()
        generator.update([Score(real.batch_id, a)], [Score(fake.batch_id, b)], collective=capture)
        totals.append(capture.total)
    assert torch.equal(totals[0], totals[1]) and totals[0].abs().max() > 0
    generator, _, (real,), (fake,) = proposed(quick, "batch.micro=null")
    b = fake.prediction.clone()
    b[0] += 50.0
    capture = Capture()
    generator.update([real], [Score(fake.batch_id, b)], collective=capture)
    assert not torch.allclose(capture.total, totals[0], rtol=1e-2, atol=1e-4)


def test_micro_batches_make_the_gradient_of_the_batch(quick) -> None:
    norms = []
    for micro in (4, 8, 16):
        generator, proposals, real, fake = proposed(quick, f"batch.micro={micro}")
        assert len(proposals) == 16 // micro
        norms.append(generator.update(real, fake).norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    generator, _, real, fake = proposed(quick, "batch.micro=4", "seed=1")
    assert generator.update(real, fake).norm != pytest.approx(norms[0], rel=1e-3)


def test_scores_of_another_iteration_are_refused(quick) -> None:
    generator, proposals, real, fake = proposed(quick)
    weight = generator.flat.weight.data.clone()
    later = [generator.propose(1, PromptBatch(p.batch_id.start, 4, {})) for p in proposals]
    assert later[0].batch_id.draw != proposals[0].batch_id.draw
    with pytest.raises(AssertionError, match="another iteration"):
        generator.update(real, fake)
    later = [generator.propose(1, PromptBatch(p.batch_id.start, 4, {})) for p in proposals]
    mixed = [Score(p.batch_id, s.prediction) for p, s in zip(later, real, strict=True)]
    with pytest.raises(AssertionError, match="another iteration"):
        generator.update(mixed, fake)
    assert torch.equal(generator.flat.weight.data, weight)


def test_an_iteration_has_its_own_regression_pairs(quick) -> None:
    """Two iterations walk all 32 pairs, each 16 of them; those of another iteration are not touched."""
    recipe = quick("ring", "method.name=dmd", "method.regression.weight=1", "method.regression.pairs=32")
    family = recipe_family(recipe)
    generator = Generator(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max))
    noise = normal(Key(0, 0, "pairs", 0), 0, 32, (2,))
    result = torch.zeros(32, 2)
    result[RowOrder(0, "regression", [RowGroup(32, 0)]).rows(0, 16)] = torch.nan  # those of iteration 0
    generator.pairs = Pairs(noise, result, {})
    generator.start_phase(0, 0)
    for iteration, spoilt in ((1, False), (0, True), (1, False), (2, True)):  # 2 begins a new epoch
        proposals = [generator.propose(iteration, PromptBatch(start, 4, {})) for start in (0, 4, 8, 12)]
        scores = [Score(p.batch_id, torch.zeros_like(p.x_t)) for p in proposals]
        if spoilt:
            with pytest.raises(FloatingPointError):
                generator.update(scores, scores)
        else:
            assert generator.update(scores, scores).norm > 0  # of the regression alone: the scores agree


# ---------------------------------------------------------------- the fake score's update


def test_the_fake_trains_on_x_s_at_the_phases_times(quick) -> None:
    recipe = quick("ring", "method.name=phased", "batch.micro=null")
    family = recipe_family(recipe)
    teacher = family.load_teacher()
    generator, fake = (
        Generator(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)),
        Fake(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)),
    )
    generator.start_phase(0, 0)
    fake.start_phase(0, 0)
    samples = generator.rollout(0, 1, PromptBatch(0, 16, {}))
    capture = Capture()
    stats = fake.update([samples], collective=capture)

    network = family.load_teacher().requires_grad_(True)
    t = 0.52 + 0.48 * uniform(Key(0, 0, "fake-t", 1), 0, 16)
    noise = normal(Key(0, 0, "fake-noise", 1), 0, 16, (2,))
    a = ((1 - t) / 0.5)[:, None].float()
    sigma = (t[:, None] ** 2 - (a.double() * 0.5) ** 2).sqrt().float()
    x_t = a * samples.x_s + sigma * noise

    def flat_gradient(target: str) -> Tensor:
        loss = score_matching_loss(
            family.schedule, network(x_t, t, {}), samples.x_s, noise, t, 0.5, "flow", clamp=10.0, target=target
        )
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss.sum() / 16, list(network.parameters()))])

    right, wrong = flat_gradient("subinterval"), flat_gradient("naive")
    assert torch.allclose(capture.total, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))
    assert not torch.allclose(wrong, right, rtol=0.1, atol=1e-2 * float(right.abs().max()))
    assert stats.version == fake.updates == 1 and stats.micro[0][0] == 0
    assert stats.norm == pytest.approx(float(right.norm()), rel=1e-3)


def test_the_fakes_gradient_is_of_the_batch_however_it_is_cut(quick) -> None:
    norms, losses = [], []
    for micro in (4, 8, 16):
        recipe = quick("ring", "method.name=phased", f"batch.micro={micro}")
        family = recipe_family(recipe)
        generator, fake = (
            kind(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max))
            for kind in (Generator, Fake)
        )
        generator.start_phase(0, 0)
        fake.start_phase(0, 0)
        stats = fake.update([generator.rollout(0, 0, PromptBatch(start, micro, {})) for start in range(0, 16, micro)])
        assert [start for start, _ in stats.micro] == list(range(0, 16, micro))
        norms.append(stats.norm)
        losses.append(sum(row["loss_fake"] for _, row in stats.micro) / len(stats.micro))
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5) and losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_fake_is_remade_from_the_teacher_each_phase(quick) -> None:
    recipe = quick("digits", "method.name=phased")
    family = recipe_family(recipe)
    teacher = family.load_teacher()
    generator, fake = (
        Generator(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)),
        Fake(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)),
    )
    generator.start_phase(0, 0)
    fake.start_phase(0, 0)
    weights = torch.cat([p.detach().reshape(-1) for p in teacher.parameters()])
    assert torch.equal(fake.flat.weight.data, weights)
    conditions = {"label": torch.arange(4)}
    proposal = generator.propose(0, PromptBatch(0, 4, conditions))
    with torch.no_grad():
        conditional = teacher(proposal.x_t, proposal.t, conditions)
        unconditional = teacher(proposal.x_t, proposal.t, {"label": torch.full((4,), 10)})
    assert torch.equal(fake.score(proposal).prediction, conditional)  # without guidance
    guided = Scorer(recipe, family, teacher).score(proposal)
    scale = recipe.teacher.guidance_scale
    assert scale == 1.5
    assert torch.allclose(guided.prediction, unconditional + scale * (conditional - unconditional), atol=1e-5)
    assert not torch.allclose(guided.prediction, conditional + scale * (conditional - unconditional), atol=1e-4)
    plain = Scorer(quick("digits", "teacher.guidance_scale=1"), family, teacher).score(proposal)
    assert torch.equal(plain.prediction, conditional)

    for u in range(2):
        fake.update([generator.rollout(0, u, PromptBatch(start, 4, conditions)) for start in (0, 4, 8, 12)])
    assert fake.score(proposal).batch_id.fake_version == 2 and guided.batch_id.fake_version == -1
    assert not torch.equal(fake.score(proposal).prediction, conditional)
    fake.start_phase(1, 2)
    assert torch.equal(fake.flat.weight.data, weights) and fake.updates == 2 and fake.flat.version == 0
    assert sorted(fake.flat.state()) == ["version", "weight"]  # no moments of the phase before
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), family.load_teacher().parameters(), strict=True))
