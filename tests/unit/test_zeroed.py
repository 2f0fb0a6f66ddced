"""Samples without a finite gradient: counted, laid to the role that made them, told, and too many end the run."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from raydmd.errors import RunError
from raydmd.methods.local import train
from raydmd.methods.registry import plan_phases
from raydmd.runs.run import recipe_family
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.workers.base import CallStats
from raydmd.training.discriminator import Discriminator
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.messages import BatchId, PromptBatch, Stepped, UpdateStats
from raydmd.training.teacher import Scorer
from raydmd.training.zeroed import by_role, refuse_too_many

NAN, INF = float("nan"), float("inf")


def test_each_sample_is_laid_to_the_first_role_that_broke_it() -> None:
    x_s, teacher, fake = (torch.zeros(6, 2, 3) for _ in range(3))
    x_s[0, 0, 0], teacher[0] = NAN, NAN  # what follows from a broken sample is not the teacher's fault
    teacher[1, 1, 2], fake[1] = INF, NAN
    fake[2, 0, 1] = -INF
    zeroed = torch.tensor([True, True, True, True, False, False])  # the fourth overflowed
    assert by_role(zeroed, generator=x_s, teacher=teacher, fake=fake) == {"generator": 2, "teacher": 1, "fake": 1}
    assert by_role(torch.zeros(6, dtype=torch.bool), generator=x_s, teacher=teacher) == {}


def test_a_discriminator_leaves_them_out_and_counts_the_teachers(quick: Any) -> None:
    recipe = quick("digits", "method.name=adm", "method.discriminator.width=16", "batch.size=4", "batch.micro=4")
    family = recipe_family(recipe)
    teacher = family.load_teacher()

    def updated(real: torch.Tensor, generated: torch.Tensor) -> tuple[UpdateStats, torch.Tensor]:
        part = Discriminator(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max))
        part.start_phase(0, 0)
        labels = {"label": torch.arange(len(real))}
        t = torch.full((len(real),), 0.5, dtype=torch.float64)
        steps = [Stepped(BatchId(0, 0, 0, 0), x, t, labels) for x in (real, generated)]
        return part.update([steps[0]], [steps[1]]), part.flat.weight

    torch.manual_seed(0)
    whole = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    spoilt = whole[0].clone(), whole[1].clone()
    spoilt[0][2, 0, 0, 0], spoilt[1][3] = NAN, INF
    stats, weights = updated(*spoilt)
    assert stats.zeroed == {"teacher": 1} and stats.norm > 0 and weights.isfinite().all()
    first, without = updated(whole[0][:2], whole[1][:2])  # a batch of two good ones, over four
    assert torch.allclose(weights, without, atol=1e-6) and stats.norm == pytest.approx(first.norm, rel=1e-4)
    assert updated(*whole)[0].norm != pytest.approx(stats.norm, rel=1e-2) and updated(*whole)[0].zeroed == {}


def test_the_generators_update_counts_them_and_the_others_train(quick: Any) -> None:
    recipe = quick("ring", "method.name=dmd")
    family = recipe_family(recipe)
    teacher = family.load_teacher()
    generator, fake, scorer = (
        kind(recipe, family, teacher, plan_phases(recipe, family.schedule.t_max)) for kind in (Generator, Fake, Scorer)
    )
    generator.start_phase(0, 0)
    fake.start_phase(0, 0)
    for u in range(2):  # until it is another than the teacher
        fake.update([generator.rollout(0, u, PromptBatch(start, 4, {})) for start in range(0, 16, 4)])
    proposals = [generator.propose(0, PromptBatch(start, 4, {})) for start in range(0, 16, 4)]
    real, made = [scorer.score(p) for p in proposals], [fake.score(p) for p in proposals]
    spoilt = real[1].prediction.clone()
    spoilt[2:] = NAN
    real[1] = replace(real[1], prediction=spoilt)
    made[3].prediction[0] = INF
    before = generator.flat.weight.clone()
    stats = generator.update(real, made)
    assert stats.zeroed == {"teacher": 2, "fake": 1}
    assert stats.norm > 0 and generator.flat.weight.isfinite().all() and not torch.equal(before, generator.flat.weight)


def call_stats(*zeroed: dict[str, int]) -> list[CallStats]:
    names = Generator.figures
    micro = [(0, dict(zip(names, (0.1, NAN, 1.0), strict=True))), (4, dict(zip(names, (0.3, 0.5, 1.0), strict=True)))]
    return [CallStats("generator", n, 0.1, UpdateStats(1.0, micro, 1, counts)) for n, counts in enumerate(zeroed)]


def test_they_are_in_the_metrics_and_events_and_many_are_warned_of(quick: Any, tmp_path: Path) -> None:
    said = io.StringIO()
    recorder = Recorder(tmp_path, quick("ring", "monitor.zeroed_warn_share=0.2"), 100, Console(file=said, width=200))
    recorder.rewind(0)
    try:
        for n in range(60):
            made = call_stats({"teacher": 2}, {"teacher": 1, "fake": 1} if n >= 3 else {}) if n >= 2 else call_stats({})
            recorder.iteration(0, n, made, {"generator": 2})
    finally:
        recorder.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["zeroed_samples"] for line in lines[:4]] == [{}, {}, {"teacher": 2}, {"teacher": 3, "fake": 1}]
    assert lines[3]["x_s_mean"] == 0.5  # of what is a number: NaN is no JSON
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert [(e["event"], e["iteration"], e["samples"]) for e in events] == [("zeroed", 2, 2), ("zeroed", 52, 4)]
    assert events[1]["share"] == 0.25 and events[1]["roles"] == {"teacher": 3, "fake": 1}
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning: ")]
    words = "4 of 16 samples had no finite gradient and were left out: made 3 by the teacher and 1 by the fake"
    assert warnings == [f"warning: iteration {n}: {words}" for n in (3, 53)]


def test_more_than_a_share_end_the_run_and_just_that_share_does_not(quick: Any) -> None:
    recipe = quick("ring")
    refuse_too_many(recipe, 3, {})
    refuse_too_many(recipe, 3, {"teacher": 4, "fake": 4})
    with pytest.raises(RunError, match=r"iteration 3: 9 of 16 .* made 4 by the teacher and 5 by the fake; .*fake's"):
        refuse_too_many(recipe, 3, {"teacher": 4, "fake": 5})
    refuse_too_many(quick("ring", "monitor.zeroed_end_share=1"), 3, {"teacher": 16})


def test_the_reference_ends_by_the_same_rule_and_pairs_that_are_none_are_refused(
    quick: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*overrides: str) -> None:
        recipe = quick("ring", "method.name=dmd", *overrides)
        family = recipe_family(recipe)
        train(recipe, family, family.load_teacher(), prompts("ring"))

    run()
    predict = Scorer.predict
    monkeypatch.setattr(Scorer, "predict", lambda self, *a: predict(self, *a) * NAN)
    with pytest.raises(RunError, match="iteration 0: 16 of 16 .* by the teacher"):
        run()
    with pytest.raises(RunError, match="24 of the teacher's ODE pairs 0 to 23 are not finite"):
        run("method.regression.weight=0.5", "method.regression.pairs=24")


def test_a_gradient_that_is_none_is_said_to_be_whose(quick: Any) -> None:
    recipe = quick("ring", "method.name=dmd")
    family = recipe_family(recipe)
    generator, fake = (
        kind(recipe, family, family.load_teacher(), plan_phases(recipe, family.schedule.t_max))
        for kind in (Generator, Fake)
    )
    generator.start_phase(0, 0)
    fake.start_phase(0, 0)
    samples = [generator.rollout(0, 0, PromptBatch(start, 4, {})) for start in range(0, 16, 4)]
    broken = [replace(samples[0], x_s=samples[0].x_s * NAN), *samples[1:]]
    with pytest.raises(FloatingPointError, match="a gradient is not finite: the generator made 4 samples"):
        fake.update(broken)
    fake.update(samples)
    with torch.no_grad():
        fake.flat.weight[0] = NAN
    with pytest.raises(FloatingPointError, match="nor is the fake score's loss"):
        fake.update(samples)
    with torch.no_grad():
        generator.flat.weight[0] = NAN
    proposals = [generator.propose(0, PromptBatch(start, 4, {})) for start in range(0, 16, 4)]
    scores = [Scorer(recipe, family, family.load_teacher()).score(p) for p in proposals]
    with pytest.raises(FloatingPointError, match="nor are the generator's own samples"):
        generator.update(scores, scores)
