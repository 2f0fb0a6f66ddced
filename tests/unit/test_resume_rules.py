"""Which settings may change when a run is continued: each is free, or refused by its name."""

from pathlib import Path
from typing import Any

import pytest
from mortal import SaveExpert, manifest, shards

from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.preparation import prepare
from raydmd.runtime.resume_rules import FREE, check_same_run, differences

BASE = ["iterations=[6, 4]", "method.fake_updates=5", "batch.size=16", "batch.micro=null", "seed=3"]


def recipe(*overrides: str) -> Any:
    return load_recipe("ring", [*BASE, *overrides])


def check(change: list[str], done: int, before: tuple[str, ...] = ()) -> None:
    check_same_run(recipe(*before), recipe(*before, *change), "--out run", lambda: done)


@pytest.mark.parametrize(
    "change",
    [
        "name=other", "runtime.fake.max_workers=3", "runtime.max_staleness=1",
        "monitor.samples_every=7", "monitor.tensorboard=false", "checkpoint.every=3", "checkpoint.keep=5",
        "evaluation.samples=100", "pairs.path=/pairs", "prompts.cache_mb=1", "prompts.stream_workers=2",
        "prompts.cache=/other",
        "pretrain.max_workers=5", "pretrain.cpus=2", "pretrain.checkpoint_every=7",
    ],
)  # fmt: skip
def test_what_leaves_every_bit_may_change(change: str) -> None:
    assert recipe(change) != recipe()
    check([change], done=7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=4", "seed: 3 there, 4 here"),
        ("ema=0.5", "ema: 0.99 there, 0.5 here"),
        ("optimizer.fake.lr=0.5", "optimizer.fake.lr: 0.001 there, 0.5 here"),
        ("optimizer.fake.schedule=linear", "optimizer.fake.schedule: constant there, linear here"),
        ("optimizer.generator.warmup=2", "optimizer.generator.warmup: 0 there, 2 here"),
        ("batch.micro=8", "batch.micro: None there, 8 here"),
        ("teacher.options={width: 32}", "teacher.options.width: "),
        ("pretrain.lr=1", "pretrain.lr: "),
        ("prompts.path=/rows.parquet", "prompts.path: None there, /rows.parquet here"),
        ("method.fake_updates=4", "method.fake_updates: 5 there, 4 here"),
    ],
)
def test_what_does_not_is_refused_by_its_name(change: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check([change], done=7)
    told = str(caught.value)
    assert told.startswith(f"--out run: it holds a run of another recipe ({words}") and "\n" not in told
    assert told.endswith("leave that as it was, or choose another place")


def test_several_changes_are_counted() -> None:
    with pytest.raises(UserError, match=r"\(seed: 3 there, 4 here, and 1 more\)"):
        check(["seed=4", "ema=0.5", "monitor.samples=3"], done=7)
    assert differences(recipe(), recipe()) == []
    sections = {key.split(".")[0] for key in FREE}
    assert sections <= set(type(recipe()).model_fields)  # each key is one that there is


@pytest.mark.parametrize(
    ("iterations", "done"),
    [
        ("[6, 40]", 10),  # finished
        ("[6, 40]", 7),
        ("[6, 2]", 7),
        ("[60, 4]", 3),
        ("[60, 4]", 6),  # the second has not begun
        ("10", 0),
        ("[6, 1]", 7),
    ],
)
def test_the_phase_in_training_and_later_ones_may_be_of_another_length(iterations: str, done: int) -> None:
    check([f"iterations={iterations}"], done)


@pytest.mark.parametrize(
    ("iterations", "done", "words"),
    [
        (
            "[7, 4]",
            7,
            r"phase 1 was trained for 6 and would have 7; give one number a phase, e.g. iterations: \[6, 5\]",
        ),
        ("20", 10, r"\[6, 4\] there, 20 here: phase 1 was .* 6 and would have 10; .* e.g. iterations: \[6, 14\]"),
        ("[6, 1]", 9, "9 are made, and phase 2 would end at 7; choose 3 or more for it"),
        ("[4, 4]", 5, "5 are made, and phase 1 would end at 4; choose 5 or more for it"),
    ],
)
def test_what_is_trained_stays(iterations: str, done: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check([f"iterations={iterations}"], done)
    assert str(caught.value).startswith("--out run: iterations: ")


def test_a_falling_learning_rate_fixes_the_length_of_a_phase_that_is_begun() -> None:
    falling = ("optimizer.fake.schedule=cosine",)
    for done in (7, 10):
        with pytest.raises(UserError, match=r"optimizer\.fake\.schedule: cosine goes by the length of phase 2"):
            check(["iterations=[6, 9]"], done, falling)
    check(["iterations=[6, 9]"], 6, falling)  # it has not begun
    check(["iterations=[6, 9]"], 7, ("optimizer.fake.warmup=2",))


def finished(folder: Path, keep: int) -> None:
    """Leave what a finished run of `BASE` leaves."""
    prepare(recipe(), folder, "auto")
    archive = Archive(str(folder / "checkpoints"), keep)
    SaveExpert(0, 7)(archive)
    archive.save(manifest(6, phase=1, experts=1), {})
    archive.save(manifest(8, phase=1, experts=1), shards(8))
    SaveExpert(1, 9)(archive)
    archive.save(manifest(10, phase=2, experts=2), {})


def test_a_finished_run_goes_on_from_before_its_phases_end(tmp_path: Path) -> None:
    finished(tmp_path, keep=2)
    said: list[str] = []
    assert prepare(recipe(), tmp_path, "auto", say=said.append) == 10 and said == []
    longer = recipe("iterations=[6, 9]")
    assert prepare(longer, tmp_path, "auto", say=said.append) == 8
    assert said == [
        "iterations: [6, 4] there, [6, 9] here: the run goes on from iteration 8, its last manifest of before the end "
        "of its phase"
    ]
    assert "- 9\n" in (tmp_path / "recipe.yaml").read_text()
    assert prepare(longer, tmp_path, "auto", say=said.append) == 8 and len(said) == 1


def test_where_nothing_is_from_before_it_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, keep=1)
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=r"none of its manifests is of before the end .*checkpoint\.keep: 2"):
        prepare(recipe("iterations=[6, 9]"), tmp_path, "auto")
    assert (tmp_path / "recipe.yaml").read_bytes() == before
