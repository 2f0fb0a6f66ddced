"""Which rows a run's samples use: each stream walks all of them equally, whatever the table, batch and updates."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from raydmd.config.recipe import Recipe
from raydmd.data import prompts as tables
from raydmd.data import row_order
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.data.row_order import PromptOrder, RowGroup, RowOrder
from raydmd.diffusion.random import Key, permutation
from raydmd.diffusion.schedule import RectifiedFlow
from raydmd.methods.loading import parse_recipe
from raydmd.methods.local import train
from raydmd.methods.registry import build_method
from raydmd.models.base import Denoiser, Family
from raydmd.training.generator import Generator
from raydmd.training.messages import PromptBatch

STREAMS = ("fake", "generator")
PINNED = [0, 8, 4, 7, 5, 1, 3, 9, 6, 2]


def recipe_of(size: int, updates: int, **more: Any) -> Recipe:
    return parse_recipe(
        {"name": "x", "batch": {"size": size}, "method": {"name": "phased", "fake_updates": updates}, **more}, "x"
    )


def order_of(size: int, updates: int, groups: list[RowGroup]) -> PromptOrder:
    recipe = recipe_of(size, updates)
    return PromptOrder(recipe, groups, build_method(recipe).draws)


def spread(counts: np.ndarray) -> int:
    return int(counts.max() - counts.min())


def by_stream(order: PromptOrder, iterations: int) -> dict[str, list[np.ndarray]]:
    size, updates = order.size, len(order.draws) - 1
    return {
        "fake": [order.draw(n, u, 0, size) for n in range(iterations) for u in range(updates)],
        "generator": [order.draw(n, updates, 0, size) for n in range(iterations)],
    }


def old_rule(total: int, size: int, updates: int, iterations: int) -> dict[str, list[np.ndarray]]:
    """Sample k of the run uses row k mod N, whichever stream it belongs to."""
    draws = [(np.arange(size) + d * size) % total for d in range(iterations * (updates + 1))]
    own = range(updates, len(draws), updates + 1)
    return {"fake": [draw for d, draw in enumerate(draws) if d not in own], "generator": [draws[d] for d in own]}


def worst(draws: list[np.ndarray], total: int) -> int:
    """The largest difference between two rows' counts, looked at after every draw."""
    counts, found = np.zeros(total, np.int64), 0
    for draw in draws:
        np.add.at(counts, draw, 1)
        found = max(found, spread(counts))
    return found


@pytest.mark.parametrize("total", [1, 2, 7, 16, 96, 97, 384, 1000])
@pytest.mark.parametrize(("size", "updates"), [(1, 1), (16, 5), (64, 5), (24, 2), (48, 3)])
def test_rows_are_used_equally_in_both_streams(total: int, size: int, updates: int) -> None:
    iterations = min(40, 2 + 3 * total // size)
    order = order_of(size, updates, [RowGroup(total, 10)])
    for stream, draws in by_stream(order, iterations).items():
        flat = np.concatenate(draws)
        assert worst(draws, total) <= 1, stream
        for end in range(0, len(flat), max(1, len(flat) // 50)):
            assert spread(np.bincount(flat[:end], minlength=total)) <= 1, stream


@pytest.mark.parametrize(("total", "size", "updates"), [(96, 16, 5), (384, 64, 5), (48, 16, 2)])
def test_the_rule_that_was_shared_by_the_streams_uses_some_rows_only(total: int, size: int, updates: int) -> None:
    """The control: the generator sees an (updates + 1)th of the rows for ever, and the fake never those."""
    seen = {stream: set(np.concatenate(draws)) for stream, draws in old_rule(total, size, updates, 200).items()}
    assert len(seen["generator"]) == total // (updates + 1) and not seen["generator"] & seen["fake"]
    assert worst(old_rule(total, size, updates, 200)["generator"], total) == 200 * size * (updates + 1) // total


def test_an_order_is_a_function_of_seed_epoch_and_stream_alone() -> None:
    groups = [RowGroup(rows, 10) for rows in (30, 1, 0, 66)]
    order = RowOrder(3, "a", groups)
    whole = order.rows(0, 300)
    assert [sorted(whole[k : k + 97]) for k in (0, 97)] == [list(range(97))] * 2
    assert not np.array_equal(whole[:97], whole[97:194])
    for start, count in ((290, 10), (0, 5), (95, 4), (150, 0), (96, 150)):  # in no order, across epochs
        assert np.array_equal(order.rows(start, count), whole[start : start + count])
        assert np.array_equal(RowOrder(3, "a", groups).rows(start, count), whole[start : start + count])
    assert np.array_equal(RowOrder(3, "a", [RowGroup(97, 5)]).rows(0, 300), whole)  # small: whatever the groups
    for other in (RowOrder(4, "a", groups), RowOrder(3, "b", groups)):
        assert (other.rows(0, 97) == whole[:97]).sum() < 12
    with pytest.raises(ValueError, match="0"):
        order.rows(-1, 2)
    with pytest.raises(ValueError, match="no order"):
        RowOrder(3, "a", [RowGroup(0, 0)])


def test_samples_are_numbered_draw_by_draw_and_pairs_have_an_order_of_their_own() -> None:
    order = order_of(16, 2, [RowGroup(50, 10)])
    draws = [order.draw(n, u, 0, 16) for n in range(4) for u in range(3)]
    assert np.array_equal(order.samples(0, 12 * 16), np.concatenate(draws))
    assert np.array_equal(order.samples(41, 60), np.concatenate(draws)[41:101])
    assert np.array_equal(order.draw(2, 1, 4, 8), order.draw(2, 1, 0, 16)[4:12])
    assert sorted(order.pairs(50, 50)) == list(range(50))
    assert not np.array_equal(order.pairs(0, 16), order.draw(0, 2, 0, 16))
    assert not np.array_equal(order.draw(0, 0, 0, 16), order.draw(0, 2, 0, 16))


def test_a_large_table_is_mixed_in_windows_and_each_row_group_read_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 800)
    path = write_prompts(tmp_path / "p.parquet", {"i": np.arange(5000), "x": np.zeros((5000, 3))})
    table = PromptTable(path)
    size = sum(group.size for group in table.groups)
    monkeypatch.setattr(row_order, "WINDOW_BYTES", size // 10)
    monkeypatch.setattr(tables, "CACHED_BYTES", 3 * size // 10)
    order, read, seen = order_of(16, 5, table.groups), [], []
    load = PromptTable._group
    monkeypatch.setattr(
        PromptTable, "_group", lambda self, i: (i not in self._cache and read.append(i)) or load(self, i)
    )
    for start in range(0, 2 * 6 * 5000, 240):  # chunks of the run's samples, the two streams by turns
        rows = order.samples(start, 240)
        seen.append(rows)
        assert np.array_equal(table.take(rows)["i"], rows)
    assert len(table.groups) > 100 and len(read) < 1.1 * (10 + 2) * len(table.groups)  # fake: 10 epochs, generator: 2
    generator = np.concatenate([rows.reshape(-1, 16) for rows in seen])[5::6].reshape(-1)
    assert sorted(generator[:5000]) == list(range(5000)) == sorted(generator[5000:])
    assert np.median(np.abs(np.diff(generator[:5000]))) > 1000  # neighbours in the order are not so in the file


def test_permutations_are_even_and_pinned() -> None:
    assert permutation(Key(7, 0, "rows", 3), 10).tolist() == PINNED
    assert permutation(Key(7, 0, "rows", 3), 0).tolist() == []
    many = np.stack([permutation(Key(7, 0, "rows", epoch), 6) for epoch in range(6000)])
    assert all(sorted(row) == list(range(6)) for row in many[:50])
    shares = np.stack([(many == row).mean(0) for row in range(6)])
    assert np.abs(shares - 1 / 6).max() < 4 * np.sqrt(5 / 36 / 6000)
    with pytest.raises(ValueError):
        permutation(Key(7, 0, "rows", 3), -1)


class TableNet(Denoiser):
    """The exact flow of N(mean of the prompt, .4) with a mean for each prompt."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.linspace(-1, 1, rows)[:, None])

    def forward(self, latents: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        a, s = (1 - t).float()[:, None], t.float()[:, None]
        mean = self.mean[conditions["i"]]
        y = (latents - a * mean) / (0.4 * a * a + s * s)
        return s * y - (mean + 0.4 * a * y)


class TableFamily(Family):
    """Prompts are numbers of rows, so that what is trained on can be told."""

    name: ClassVar[str] = "table"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.latent_shape, self.schedule = rows, (1,), RectifiedFlow()
        self.condition_columns, self.lora_targets = ["i"], []

    def load_teacher(self) -> Denoiser:
        return TableNet(self.rows).requires_grad_(False).eval()

    def conditions(self, rows: Any) -> dict[str, torch.Tensor]:
        return {"i": torch.from_numpy(rows["i"].astype(np.int64))}

    def unconditional(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return conditions

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_the_trainer_shows_every_prompt_to_both_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The case: 96 prompts, batches of 16, five fake updates; a sixth of the prompts, and the others, were all seen."""
    family, seen = TableFamily(96), {stream: np.zeros(96, np.int64) for stream in STREAMS}
    table = PromptTable(write_prompts(tmp_path / "p.parquet", {"i": np.arange(96)}), ["i"])
    rollout, propose = Generator.rollout, Generator.propose

    def note(stream: str, prompts: PromptBatch) -> None:
        np.add.at(seen[stream], prompts.conditions["i"].numpy(), 1)

    monkeypatch.setattr(Generator, "rollout", lambda self, *a: note("fake", a[-1]) or rollout(self, *a))
    monkeypatch.setattr(Generator, "propose", lambda self, *a: note("generator", a[-1]) or propose(self, *a))
    more = {"iterations": 15, "teacher": {"guidance_scale": 1.0}, "method": {"name": "phased", "fake_updates": 5}}
    train(recipe_of(16, 5, **more), family, family.load_teacher(), table)
    assert seen["fake"].sum() == 15 * 5 * 16 and seen["generator"].sum() == 15 * 16
    assert spread(seen["fake"]) <= 1 and spread(seen["generator"]) <= 1
