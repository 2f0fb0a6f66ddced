"""Learning rates: their law, in the local executor, on the state that recovery and resume hand over, and refusals."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from raydmd.config.recipe import Optimizer
from raydmd.errors import UserError
from raydmd.methods.local import Figures, train
from raydmd.methods.program import trace_method
from raydmd.recipe_check import check
from raydmd.runs.run import recipe_family
from raydmd.runtime.observability import recorder as recording
from raydmd.runtime.workers.base import CallStats, TrainerWorker
from raydmd.training.learning_rate import learning_rate
from raydmd.training.messages import BatchId, Samples, UpdateStats

FALLS = [
    "method.name=phased", "iterations=[5, 3]", "method.fake_updates=2", "optimizer.generator.schedule=cosine",
    "optimizer.generator.final=0.1", "optimizer.generator.warmup=2", "optimizer.fake.schedule=linear",
]  # fmt: skip


def rates(settings: Optimizer, total: int) -> list[float]:
    return [learning_rate(settings, number, total) for number in range(total)]


def test_without_a_warm_up_they_are_torchs_own() -> None:
    def torchs(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        scheduler, found = make(optimizer), []
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    kinds = torch.optim.lr_scheduler
    linear = torchs(lambda o: kinds.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=20))
    cosine = torchs(lambda o: kinds.CosineAnnealingLR(o, T_max=20, eta_min=0.2 * 3e-4))
    assert rates(Optimizer(lr=3e-4, schedule="linear", final=0.2), 20) == pytest.approx(linear)
    assert rates(Optimizer(lr=3e-4, schedule="cosine", final=0.2), 20) == pytest.approx(cosine)
    assert rates(Optimizer(lr=3e-4, schedule="cosine", final=0.2), 20) != pytest.approx(linear, rel=0.02)
    assert rates(Optimizer(lr=3e-4), 20) == [3e-4] * 20  # exactly


def test_the_warm_up_comes_before_and_what_falls_has_the_rest() -> None:
    for schedule in ("linear", "cosine"):
        warm = rates(Optimizer(lr=1.0, schedule=schedule, final=0.5, warmup=4), 24)
        assert warm[:4] == [0.25, 0.5, 0.75, 1.0] and warm[4:] == rates(
            Optimizer(lr=1.0, schedule=schedule, final=0.5), 20
        )
        assert min(warm[4:]) > 0.5 and warm[4:] == sorted(warm[4:], reverse=True)
    assert rates(Optimizer(lr=1.0, warmup=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for total in (None, 3):
        with pytest.raises(ValueError, match="update 3"):
            learning_rate(Optimizer(lr=1.0, schedule="linear"), 3, total)


def test_every_role_has_its_own_and_a_phase_begins_it_anew(quick: Any, prompts: Any) -> None:
    recipe, seen = quick("ring", *FALLS), []
    family = recipe_family(recipe)

    def keep(n: int, made: Figures) -> None:
        seen.append(made)

    run = train(recipe, family, family.load_teacher(), prompts("ring"), keep)
    own = recipe.optimizer
    generator = [made["generator"][0].lr for made in seen]
    assert generator == [*rates(own.generator, 5), *rates(own.generator, 3)]
    fake = [stats.lr for made in seen for stats in made["fake"]]
    assert fake == [*rates(own.fake, 10), *rates(own.fake, 6)] and fake[10] == own.fake.lr
    constant = train(quick("ring", *FALLS[:3]), family, family.load_teacher(), prompts("ring"))
    for one, other in zip(run.experts, constant.experts, strict=True):
        assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_rate_that_is_always_lr_is_that_of_a_recipe_without(quick: Any, prompts: Any) -> None:
    one, other = (
        train(recipe, recipe_family(recipe), recipe_family(recipe).load_teacher(), prompts("ring")).experts
        for recipe in (quick("ring"), quick("ring", "optimizer.fake.schedule=linear", "optimizer.fake.final=1"))
    )
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_who_takes_a_state_over_goes_on_with_its_rates(quick: Any) -> None:
    """As a newcomer, a survivor's or a manifest's state: the number of updates is all that a rate needs."""
    recipe = quick("ring", *FALLS, "optimizer.fake.warmup=3")
    batches = [
        [Samples(BatchId(0, n, start, 0), torch.randn(4, 2, generator=torch.Generator().manual_seed(n + start)), {})
         for start in range(0, 16, 4)]
        for n in range(6)
    ]  # fmt: skip

    def worker() -> TrainerWorker:
        return TrainerWorker("fake", recipe, 0, torch.get_num_threads(), "cpu")

    whole, late = worker(), worker()
    whole.start_phase(0, 0)
    expected, state = [], None
    for number, samples in enumerate(batches):
        if number == 2:
            state = whole.state(2)
        expected.append(whole.part.update(samples).lr)
    late.take_over(0, 2, state)
    found = [late.part.update(samples).lr for samples in batches[2:]]
    assert found == expected[2:] == rates(recipe.optimizer.fake, 10)[2:6] and len(set(expected)) > 4
    assert torch.equal(late.part.flat.weight, whole.part.flat.weight)
    late.take_over(0, 0, None)  # with the rates of another number it would have come elsewhere
    for samples in batches[2:]:
        late.part.update(samples)
    assert not torch.equal(late.part.flat.weight, whole.part.flat.weight)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.fake.warmup=16", "iterations=[9, 8]"], "optimizer.fake.warmup: 16 of the 16 updates of phase 2"),
        (["optimizer.generator.warmup=500"], "optimizer.generator.warmup: 500 of the 2 updates of phase 1"),
    ],
)
def test_a_warm_up_that_has_no_end_is_refused(quick: Any, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(quick("ring", "method.name=phased", *overrides))
    assert check(quick("ring", "method.name=phased", "optimizer.fake.warmup=15", "iterations=[9, 8]")) == []


def test_updates_are_counted_in_their_phase(quick: Any) -> None:
    """DMDX's fake score has none until its own part of the phase."""
    trace = trace_method(quick("ring", *FALLS))
    assert [trace.updates_in(phase) for phase in (0, 1)] == [
        {"generator": 5, "fake": 10}, {"generator": 3, "fake": 6},
    ]  # fmt: skip
    late = trace_method(quick("ring", "method.name=dmdx", "method.adp.iterations=3", "iterations=5"))
    assert late.updates_in(0)["generator"] == 5 and late.updates_in(0)["fake"] == 4


def test_a_line_of_the_metrics_has_each_roles(quick: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exported:
        def __init__(self, run: str) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return lambda *values: None

    monkeypatch.setattr(recording, "Metrics", Exported)  # which needs a Ray that is up
    recorder = recording.Recorder(tmp_path, quick("ring"), 4, Console(file=io.StringIO()))
    recorder.rewind(0)
    stats = [
        CallStats("fake", 0, 0.1, UpdateStats(1.0, [(0, {"loss_fake": 1.0})], version, lr=lr))
        for version, lr in ((2, 0.25), (1, 0.5))
    ]
    line = recorder.iteration(0, 0, stats, {"fake": 1, "generator": 1, "teacher": 1})
    recorder.close()
    assert line["fake_learning_rate"] == 0.25 and line["generator_learning_rate"] is None
    assert "fake_learning_rate" in recorder.shown
