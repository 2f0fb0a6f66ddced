"""ODE pairs in shards: whole or not there, the bits of those in memory, and nothing taken that a run would not make."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydmd.config.recipe import Recipe
from raydmd.data import prompts as prompts_module
from raydmd.data.pair_shards import (
    INDEX_FILE,
    PairFacts,
    PairIndex,
    ShardedPairs,
    check_pairs,
    claim_index,
    missing_shards,
    read_index,
    shard_name,
    write_shard,
)
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.data.trajectories import PAIR_CHUNK, Pairs
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import make_pairs, train
from raydmd.methods.pairs import folder_pairs, pair_facts
from raydmd.methods.registry import build_method
from raydmd.models.base import Family
from raydmd.recipe_check import absolute, check, check_offline, notes
from raydmd.runs.run import recipe_family
from raydmd.training.teacher import Scorer

TOTAL = 600  # two whole chunks, and a shorter one
DMD = ["method.name=dmd", "method.regression.weight=0.5", f"method.regression.pairs={TOTAL}", "teacher.steps=3"]


@dataclass
class Set:
    """A teacher, its pairs in memory, and what they are."""

    recipe: Recipe
    family: Family
    scorer: Scorer
    table: PromptTable
    facts: PairFacts
    pairs: Pairs

    def range(self, start: int, count: int) -> Pairs:
        return make_pairs(build_method(self.recipe), self.family, self.scorer, self.table, count, first=start)

    def write(self, folder: Path, shard_size: int = PAIR_CHUNK, leave_out: int = -1) -> PairIndex:
        """Write the shards, each made by itself, last first."""
        index = claim_index(folder, PairIndex(self.facts, TOTAL, shard_size))
        for number in reversed(range(index.shards)):
            if number != leave_out:
                write_shard(folder, index, number, self.range(*index.span(number)))
        return index


@pytest.fixture(scope="module")
def made(quick: Any, prompts: Any) -> Set:
    recipe = quick("digits", *DMD)
    family, table = recipe_family(recipe), prompts("digits")
    scorer = Scorer(recipe, family, family.load_teacher())
    pairs = make_pairs(build_method(recipe), family, scorer, table, TOTAL)
    return Set(recipe, family, scorer, table, pair_facts(recipe, family, table), pairs)


def assert_equal(found: tuple[Any, Any, Any], expected: tuple[Any, Any, Any]) -> None:
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert found[2].keys() == expected[2].keys() != set()
    for name, value in expected[2].items():
        assert found[2][name].dtype == value.dtype and torch.equal(found[2][name], value)


@pytest.mark.parametrize("shard_size", [PAIR_CHUNK, 2 * PAIR_CHUNK])
def test_shards_have_the_bits_of_pairs_in_memory(made: Set, tmp_path: Path, shard_size: int) -> None:
    """Whatever the shards' size; taken in any order, more than once, from several shards."""
    index = made.write(tmp_path, shard_size)
    assert index.shards == -(-TOTAL // shard_size) and missing_shards(tmp_path, index, thorough=True) == []
    found = ShardedPairs(tmp_path, TOTAL)
    assert len(found) == TOTAL == len(made.pairs)
    for numbers in (np.arange(TOTAL), np.array([599, 0, 255, 256, 0, 512]), np.array([3]), np.array([], np.int64)):
        assert_equal(found.take(numbers), made.pairs.take(numbers))
    with pytest.raises(AssertionError):
        assert_equal(found.take(np.array([0, 1])), made.pairs.take(np.array([1, 0])))
    first = ShardedPairs(tmp_path, PAIR_CHUNK)
    assert len(first) == PAIR_CHUNK
    for numbers in (np.array([PAIR_CHUNK]), np.array([-1])):
        with pytest.raises(IndexError, match="pairs 0..255"):
            first.take(numbers)


def test_a_shard_is_whole_chunks(made: Set, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole chunks of 256"):
        PairIndex(made.facts, TOTAL, 300)
    index = claim_index(tmp_path, PairIndex(made.facts, TOTAL))
    with pytest.raises(ValueError, match="256 pairs, not 88"):
        write_shard(tmp_path, index, 0, made.range(512, 88))
    assert [path.name for path in tmp_path.iterdir()] == [INDEX_FILE]


def test_what_is_not_whole_is_missing(made: Set, tmp_path: Path) -> None:
    """A shard that was cut short, one that was left out, and another folder's; with checksums, one that has rotted."""
    index = made.write(tmp_path / "a", leave_out=1)
    folder, content = tmp_path / "a", (tmp_path / "a" / shard_name(0)).read_bytes()
    assert missing_shards(folder, index) == [1]
    (folder / shard_name(1)).write_bytes(content)  # another one's, under its name
    (folder / shard_name(0)).write_bytes(content[:-1])
    (folder / f".{shard_name(2)}.1.part").write_bytes(content)
    assert missing_shards(folder, index) == [0, 1]
    with pytest.raises(UserError, match=r"pairs.path: .*000001.safetensors is not there or not whole; .*--count 600"):
        ShardedPairs(folder, TOTAL).take(np.array([300]))
    for number in (0, 1):
        write_shard(folder, index, number, made.range(*index.span(number)))
    assert missing_shards(folder, index, thorough=True) == []

    other = replace(made.facts, seed=7)
    (tmp_path / "b").mkdir()
    theirs = claim_index(tmp_path / "b", PairIndex(other, TOTAL))
    (tmp_path / "b" / shard_name(0)).write_bytes(content)
    assert missing_shards(tmp_path / "b", theirs) == [0, 1, 2]

    rotten = bytearray(content)
    rotten[-5] ^= 1
    (folder / shard_name(0)).write_bytes(rotten)
    assert missing_shards(folder, index) == [] and missing_shards(folder, index, thorough=True) == [0]
    pairs = ShardedPairs(folder, TOTAL)
    with pytest.raises(UserError, match=r"pair \d+ in .*000000.safetensors is not what was written"):
        pairs.take(np.arange(PAIR_CHUNK))
    assert_equal(pairs.take(np.array([400])), made.pairs.take(np.array([400])))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"family": "ring"}, "teacher.family: ring there, digits here"),
    "teacher": ({"teacher": "0" * 32}, "teacher.path: another teacher, of fingerprint 000"),
    "guidance": ({"guidance_scale": 2.0}, "teacher.guidance_scale: 2 there, 1.5 here"),
    "steps": ({"steps": 9}, "teacher.steps: 9 there, 3 here"),
    "grid": ({"times": (1.0, 0.9, 0.5, 0.0)}, "teacher.timestep_shift: other times"),
    "dtype": ({"dtype": "bfloat16"}, "teacher.options.dtype: bfloat16 there, float32 here"),
    "shape": ({"latent_shape": (1, 4, 4)}, "teacher.options.latent_shape"),
    "seed": ({"seed": 3}, "seed: 3 there, 0 here"),
    "prompts": ({"prompts": "f" * 32}, "prompts.path: other prompts"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_pairs_of_another_recipe_are_refused(made: Set, tmp_path: Path, name: str) -> None:
    """By a run, and by a job on the same folder; what differs is named, and the folder stays as it is."""
    changes, words = OTHERS[name]
    claim_index(tmp_path, PairIndex(replace(made.facts, **changes), TOTAL))
    before = (tmp_path / INDEX_FILE).read_bytes()
    with pytest.raises(UserError) as refused:
        check_pairs(str(tmp_path), made.facts, TOTAL)
    assert words in str(refused.value) and str(refused.value).startswith(f"pairs.path: '{tmp_path}'")
    with pytest.raises(UserError) as refused:
        claim_index(tmp_path, PairIndex(made.facts, TOTAL))
    assert words in str(refused.value) and str(refused.value).startswith(f"--out {tmp_path}: ")
    assert "\n" not in str(refused.value) and (tmp_path / INDEX_FILE).read_bytes() == before


def test_facts_are_read_as_they_were_written(made: Set, tmp_path: Path) -> None:
    index = PairIndex(replace(made.facts, teacher="1" * 32 + "@abc", times=(1.0, 0.1 + 0.2, 0.0)), TOTAL, 512)
    claim_index(tmp_path, index)
    found = read_index(tmp_path)
    assert found == index and found.digest() == index.digest() != PairIndex(index.facts, TOTAL).digest()
    assert replace(index.facts, teacher="1" * 32).difference(index.facts) is None  # a hub's, wherever it lies now
    assert replace(index.facts, prompts=None).difference(index.facts) is None
    for changes, words in (({"total": 700}, "total: 600 there, 700 here"), ({"shard_size": 256}, "shard_size: 512 th")):
        with pytest.raises(UserError, match=words):
            claim_index(tmp_path, replace(index, **changes))


def test_a_folder_that_cannot_be_used(made: Set, tmp_path: Path) -> None:
    def refused(folder: Path, count: int = TOTAL) -> str:
        with pytest.raises(UserError, match=r"^[^\n]+$") as error:
            check_pairs(str(folder), made.facts, count)
        return str(error.value)

    folder = tmp_path / "digits-pairs"
    index = made.write(folder, leave_out=2)
    go_on = f"has 2 of 3 shards; `raydmd pairs RECIPE --count 600 --out {folder}` goes on"
    assert refused(folder) == f"pairs.path: '{folder}' {go_on}"
    write_shard(folder, index, 2, made.range(*index.span(2)))
    assert check_pairs(str(folder), made.facts, TOTAL) == index
    assert check_pairs(str(folder), made.facts, 512) == index and check_pairs(str(folder), made.facts, 256) == index
    assert "has 600 pairs, and the method needs 601" in refused(folder, 601)
    assert "inside a chunk of 256" in refused(folder, 300) and refused(folder, 300).endswith("let it take 256 or 512")
    assert refused(folder, 24).endswith("let it take 256") and refused(folder, 599).endswith("let it take 512 or 600")
    assert "did you mean 'digits-pairs'?" in refused(tmp_path / "digit-pairs")
    assert f"`raydmd pairs RECIPE --out {tmp_path / 'x'}` makes it" in refused(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    assert "it has no pairs.json" in refused(tmp_path / "empty")
    for text in ("", "[]", "{}", '{"format": "raydmd-pairs-0"}', (folder / INDEX_FILE).read_text().replace("600", "0")):
        (tmp_path / "empty" / INDEX_FILE).write_text(text)
        assert "is no record of ODE pairs" in refused(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="it is not empty and holds no pairs"):
        claim_index(tmp_path / "full", index)
    with pytest.raises(UserError, match="no pairs.json in .* on this machine"):
        ShardedPairs(tmp_path / "full", TOTAL)


def test_prompts_are_told_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(name: str, columns: list[str] | None = None, **rows: Any) -> str:
        return PromptTable(write_prompts(tmp_path / name, rows), columns).identity()

    labels, words = np.arange(64) % 10, [f"word {n}" for n in range(64)]
    plain = identity("a.parquet", label=labels)
    assert len(plain) == 32 and identity("b.parquet", label=labels) == plain
    assert identity("c.parquet", ["label"], label=labels, text=words) == plain
    monkeypatch.setattr(prompts_module, "GROUP_BYTES", 64)
    assert identity("d.parquet", label=labels) == plain  # in many row groups
    assert len(PromptTable(tmp_path / "d.parquet").groups) > 5
    changed = labels.copy()
    changed[40] = 9
    many = {plain, identity("e.parquet", label=changed), identity("f.parquet", label=labels[:-1])}
    many |= {identity("g.parquet", label=labels[::-1]), identity("h.parquet", text=words)}
    many |= {identity("i.parquet", text=["word 0w", "ord 1", *words[2:]])}
    assert len(many) == 6
    monkeypatch.setattr(prompts_module, "WINDOW_BYTES", 100)  # a table that is large: its first and last groups, sizes
    large = identity("d.parquet", label=labels)
    assert large == identity("j.parquet", label=labels) != plain
    assert len({large, identity("k.parquet", label=labels[::-1]), identity("l.parquet", label=labels[:-1])}) == 3


def experts(recipe: Recipe, prompts: Callable[[str], PromptTable]) -> list[dict[str, torch.Tensor]]:
    family = recipe_family(recipe)
    return train(recipe, family, family.load_teacher(), prompts("digits")).experts


def test_a_local_run_on_a_folder_ends_at_the_same_bits(made: Set, quick: Any, prompts: Any, tmp_path: Path) -> None:
    made.write(tmp_path / "pairs")
    own, other = experts(made.recipe, prompts), experts(quick("digits", *DMD, "method.regression.weight=0"), prompts)
    found = experts(quick("digits", *DMD, f"pairs.path={tmp_path / 'pairs'}"), prompts)
    assert all(torch.equal(found[0][name], own[0][name]) for name in own[0])
    assert any(not torch.equal(other[0][name], own[0][name]) for name in own[0])
    index = claim_index(tmp_path / "other", PairIndex(made.facts, TOTAL))  # what is there is what is trained on
    for number in range(index.shards):
        pairs = made.range(*index.span(number))
        write_shard(tmp_path / "other", index, number, Pairs(pairs.noise, pairs.result + 0.5, pairs.conditions))
    found = experts(quick("digits", *DMD, f"pairs.path={tmp_path / 'other'}"), prompts)
    assert any(not torch.equal(found[0][name], own[0][name]) for name in own[0])
    with pytest.raises(UserError, match="pairs.path: .*seed: 0 there, 1 here"):
        experts(quick("digits", *DMD, "seed=1", f"pairs.path={tmp_path / 'pairs'}"), prompts)


def test_a_recipe_is_checked_before_a_run(made: Set, quick: Any, tmp_path: Path) -> None:
    """As `raydmd distill` and `raydmd validate` do it, with the embedded prompts and a teacher's folder."""
    made.write(tmp_path / "pairs")
    path = f"pairs.path={tmp_path / 'pairs'}"
    check(quick("digits", *DMD, path))
    assert check_offline(quick("digits", *DMD, path)) == []
    assert absolute(quick("digits", *DMD, "pairs.path=a/../b")).pairs.path == str(Path("b").resolve())
    for change, words in {
        "teacher.guidance_scale=3": "teacher.guidance_scale: 1.5 there, 3 here",
        "teacher.timestep_shift=2": "teacher.timestep_shift: other times",
        "method.regression.pairs=1024": "has 600 pairs, and the method needs 1024",
        "teacher.path=null": "teacher.path",
        "pairs.path=nowhere": "no folder",
    }.items():
        with pytest.raises(UserError, match=r"^pairs.path: ") as refused:
            check(quick("digits", *DMD, path, change))
        assert words in str(refused.value)
    rows = write_prompts(tmp_path / "other.parquet", {"label": np.arange(20) % 10})
    with pytest.raises(UserError, match="prompts.path: other prompts"):
        check(quick("digits", *DMD, path, f"prompts.path={rows}"))
    with pytest.raises(UserError, match=r"pairs.path: a folder .* not a URI"):
        load_recipe("digits", ["pairs.path=s3://bucket/pairs"])
    with pytest.raises(UserError, match=r"pairs.pth.*did you mean 'path'"):
        load_recipe("digits", ["pairs.pth=x"])
    unused = quick("digits", path)
    check(unused)
    assert notes(unused) == ["pairs.path: method 'phased' takes no ODE pairs here: it is not looked at"]
    assert folder_pairs(unused) is None and notes(quick("digits", *DMD, path)) == []
