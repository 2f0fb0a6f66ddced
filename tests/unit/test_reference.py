"""The sequential reference: every method trains, to the same bits, and a phase's boundary is found."""

import numpy as np
import pytest
import torch
from conftest import train_teacher

from raydmd.data import ring as data
from raydmd.data.row_order import PromptOrder
from raydmd.data.trajectories import Pairs
from raydmd.diffusion.random import Key, normal
from raydmd.evaluation.metrics import sliced_wasserstein
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import Reference, make_pairs, train
from raydmd.methods.registry import build_method, plan_phases
from raydmd.runs.run import recipe_family
from raydmd.sampling.student import sample_student
from raydmd.training.teacher import Scorer

VARIANTS = {
    "dmd": ["method.name=dmd"],
    "dmd with regression": ["method.name=dmd", "method.regression.weight=0.5", "method.regression.pairs=24"],
    "dmd-fewstep": ["method.name=dmd-fewstep", "method.steps=2"],
    "dmd-sgts": ["method.name=dmd-sgts"],
    "phased": ["method.name=phased"],
    "phased lora": ["method.name=phased", "method.experts.kind=lora", "method.experts.rank=4"],
    "phased, four of one step": ["method.name=phased", "method.phases=4"],
    "renoise, raw, disjoint": [
        "method.solver=renoise", "method.gradient_weight=raw", "method.score_interval=disjoint", "method.clamp=null",
    ],
    "fixed t, naive, vanilla, logit-normal": [
        "method.score_interval=fixed", "method.fixed_t=0.8", "method.fake_target=naive", "method.gradient=vanilla",
        "method.score_distribution=logit_normal",
    ],
}  # fmt: skip


def run_reference(recipe, prompts, **options) -> Reference:
    family = recipe_family(recipe)
    return train(recipe, family, family.load_teacher(), prompts(recipe.teacher.family), **options)


@pytest.mark.parametrize(
    ("family", "variant"),
    [*(("ring", variant) for variant in VARIANTS), ("digits", "dmd with regression"), ("digits", "phased lora")],
)
def test_every_method_trains_and_twice_the_same(quick, prompts, family: str, variant: str) -> None:
    recipe = quick(family, *VARIANTS[variant])
    seen = []
    one = run_reference(
        recipe, prompts, on_iteration=lambda n, made: seen.append((n, made["fake"], *made["generator"]))
    )
    phases = plan_phases(recipe)
    assert len(one.experts) == len(phases)
    assert [n for n, _, _ in seen] == [0, 1, 2, 3]
    for n, fake, generator in seen:
        assert [stats.version for stats in fake] == [2 * n + 1, 2 * n + 2] and generator.version == n + 1
        assert generator.norm > 0 and all(0 < row["loss_fake"] < 1e3 for stats in fake for _, row in stats.micro)
        assert [row[0] for row in generator.micro] == [0, 4, 8, 12]
    teacher = recipe_family(recipe).load_teacher().state_dict()
    lora = "lora" in variant
    for expert in one.experts:
        assert all(value.isfinite().all() for value in expert.values())
        if lora:
            assert all(".lora_" in name for name in expert)
            assert any(value.any() for name, value in expert.items() if "lora_B" in name)  # they begin at zero
        else:
            assert expert.keys() == teacher.keys()
            assert any(not torch.equal(value, teacher[name]) for name, value in expert.items())
    two = run_reference(recipe, prompts)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one.experts, two.experts, strict=True) for name in a)
    other = run_reference(recipe.model_copy(update={"seed": 1}), prompts)
    assert not all(torch.equal(a[name], b[name]) for a, b in zip(one.experts, other.experts, strict=True) for name in a)


def test_every_switch_changes_the_run(quick, prompts) -> None:
    switches = [
        "method.solver=renoise", "method.gradient_weight=raw", "method.score_interval=disjoint", "method.clamp=0.5",
        "method.fake_target=naive", "method.gradient=vanilla", "method.score_distribution=logit_normal",
        "method.score_shift=3", "method.score_margin=0.1", "method.timestep_shift=2", "method.fake_updates=3",
        "optimizer.generator.clip=0.0001", "optimizer.fake.clip=0.01", "optimizer.generator.lr=1e-3",
        "optimizer.fake.lr=2e-3", "optimizer.fake.weight_decay=0.5", "ema=0.05", "batch.size=12", "seed=1",
    ]  # fmt: skip
    # betas and epsilon with which a gradient's size shows after few steps
    steady = [f"optimizer.{role}.{key}" for role in ("generator", "fake") for key in ("betas=[0.9, 0.99]", "eps=0.1")]
    base = run_reference(quick("ring", *steady), prompts)
    for switch in switches:
        other = run_reference(quick("ring", *steady, switch), prompts)
        last, kept = other.experts[1], base.experts[1]
        assert not all(torch.equal(last[name], kept[name]) for name in kept), switch


def test_the_cut_into_micro_batches_is_not_the_mathematics(quick, prompts) -> None:
    # A large epsilon: beta_1 = 0 would make a whole step of a rounding's sign.
    steady = ["optimizer.generator.eps=0.01", "optimizer.fake.eps=0.01", "method.name=phased"]
    four = run_reference(quick("ring", *steady, "batch.micro=4"), prompts)
    eight = run_reference(quick("ring", *steady, "batch.micro=8"), prompts)
    other = run_reference(quick("ring", *steady, "batch.micro=8", "method.fake_updates=1"), prompts)
    start = recipe_family(quick("ring")).load_teacher().state_dict()
    for a, b, c in zip(four.experts, eight.experts, other.experts, strict=True):
        moved = max(float((a[name] - start[name]).abs().max()) for name in a)
        assert moved > 1e-5
        assert all(torch.allclose(a[name], b[name], rtol=0, atol=moved * 1e-2) for name in a)
        assert not all(torch.allclose(a[name], c[name], rtol=0, atol=moved * 1e-2) for name in a)


def test_it_can_stop_on_the_way(quick, prompts) -> None:
    recipe = quick("ring", "method.name=phased")
    part = run_reference(recipe, prompts, iterations=3)
    assert len(part.experts) == 1 and part.parts["generator"].updates == 3 and part.parts["generator"].phase.index == 1
    whole = run_reference(recipe, prompts)
    assert all(torch.equal(part.experts[0][name], whole.experts[0][name]) for name in part.experts[0])


def test_an_expert_ends_as_its_average(quick, prompts) -> None:
    with_average = run_reference(quick("ring", "method.name=dmd", "ema=0.9"), prompts)
    without = run_reference(quick("ring", "method.name=dmd", "ema=0"), prompts)
    raw = with_average.parts["generator"].flat.average  # swapped at the phase's end
    last = torch.cat([value.reshape(-1) for value in without.experts[0].values()])
    mean = torch.cat([value.reshape(-1) for value in with_average.experts[0].values()])
    assert torch.equal(raw, last) and not torch.equal(mean, last)


def test_regression_pairs_are_the_teachers(quick, prompts) -> None:
    recipe = quick("digits", *VARIANTS["dmd with regression"])
    family = recipe_family(recipe)
    scorer = Scorer(recipe, family, family.load_teacher())
    pairs = make_pairs(build_method(recipe), family, scorer, prompts("digits"), 24, chunk=10)
    table = prompts("digits")
    asked = table.rows(0, len(table))["label"][
        PromptOrder(recipe, table.groups, build_method(recipe).draws).pairs(0, 24)
    ]
    assert pairs.noise.shape == (24, 1, 8, 8) and pairs.conditions["label"].tolist() == asked.tolist()
    assert torch.equal(pairs.noise, normal(Key(0, 0, "pairs", 0), 0, 24, (1, 8, 8)))
    whole = scorer.sample(pairs.noise, pairs.conditions, steps=recipe.teacher.steps)[-1]
    assert torch.allclose(pairs.result, whole, atol=1e-4)
    noise, result, conditions = pairs.take(np.array([22, 23, 0, 1]))
    assert torch.equal(noise, pairs.noise[[22, 23, 0, 1]]) and torch.equal(result, pairs.result[[22, 23, 0, 1]])
    assert torch.equal(conditions["label"], pairs.conditions["label"][[22, 23, 0, 1]])
    joined = Pairs.join([pairs, pairs])
    assert len(joined.noise) == 48


def test_regression_pulls_to_the_pairs(quick, prompts) -> None:
    def distance(weight: float) -> float:
        recipe = quick(
            "ring", "method.name=dmd", f"method.regression.weight={weight}", "method.regression.pairs=16",
            "iterations=40", "ema=0", "optimizer.generator.lr=2e-3",
        )  # fmt: skip
        run = run_reference(recipe, prompts)
        family = run.parts["generator"].family
        pairs = make_pairs(build_method(recipe), family, run.parts["teacher"], prompts("ring"), 16)
        with torch.no_grad():
            v = run.parts["generator"].experts.expert(0)(pairs.noise, torch.ones(16, dtype=torch.float64), {})
        return float((pairs.noise - v - pairs.result).square().mean())

    assert distance(10.0) < 0.5 * distance(0.0)


def test_the_right_target_finds_the_boundary_and_the_naive_one_does_not(tmp_path, prompts) -> None:
    """Phased DMD Sec. 2.3.2: one expert from t = 1 to s = .75 on the off-centre ring, sliced Wasserstein of x_s."""
    common = [f"teacher.path={tmp_path}/teacher", "batch.size=256", "method.steps=2", "method.timestep_shift=3"]
    teaching = load_recipe("ring", ["pretrain.iterations=1500", "pretrain.batch=256", "pretrain.micro=null"])
    train_teacher(teaching, tmp_path / "teacher")
    found = {}
    for target in ("subinterval", "naive"):
        recipe = load_recipe("ring", [*common, "iterations=[150, 1]", f"method.fake_target={target}"])
        run = run_reference(recipe, prompts, iterations=150)
        run.parts["generator"].flat.swap_average()
        phase = run.parts["generator"].phases[0]
        assert phase.end == pytest.approx(0.75) and phase.steps == 1
        part = run.parts["generator"]
        x_s = sample_student(part.family, part.experts, [phase], {}, 4000, seed=9).latents
        truth = 0.25 * data.sample(4000, 5) + 0.75 * normal(Key(5, 0, "truth", 0), 0, 4000, (2,))
        found[target] = sliced_wasserstein(x_s, truth)
    assert found["subinterval"] < 0.06 and found["naive"] > 4 * found["subinterval"]
