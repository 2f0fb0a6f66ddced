"""Prompt tables in Parquet, the digits, the ring."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from raydmd.data import prompts, ring
from raydmd.data.digits import load_digits
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.diffusion.random import Key
from raydmd.errors import UserError
from raydmd.models.embedded.digits import DigitsFamily
from raydmd.models.embedded.prompts import ensure_embedded_prompts

RNG = np.random.default_rng(0)
COLUMNS = {
    "label": np.arange(10),
    "embeds": RNG.standard_normal((10, 3, 4)).astype(np.float32),
    "half": RNG.standard_normal((10, 2)).astype(np.float16),
    "mask": RNG.integers(0, 2, (10, 3)).astype(bool),
    "text": np.array([f"prompt {i}" for i in range(10)], dtype=object),
}


@pytest.fixture
def table_path(tmp_path):
    return write_prompts(tmp_path / "prompts.parquet", COLUMNS)


def test_columns_come_back_as_they_were(table_path):
    table = PromptTable(table_path)
    assert len(table) == 10 and table.columns == list(COLUMNS)
    rows = table.rows(0, 10)
    for name, values in COLUMNS.items():
        assert rows[name].dtype == values.dtype and rows[name].shape == values.shape
        assert np.array_equal(rows[name], values)


def test_rows_begin_again_after_the_last(table_path):
    table = PromptTable(table_path, ["embeds", "label"])
    assert table.columns == ["embeds", "label"]
    for start, count in [(0, 3), (8, 5), (10, 1), (97, 26), (10**12 + 7, 4), (3, 0), (29, 1)]:
        rows = table.rows(start, count)
        wanted = [k % 10 for k in range(start, start + count)]
        assert rows["label"].tolist() == wanted
        assert np.array_equal(rows["embeds"], COLUMNS["embeds"][wanted]) and rows["embeds"].shape[1:] == (3, 4)


def test_row_groups_and_chunking_do_not_show(tmp_path, monkeypatch):
    big = {"label": np.arange(101), "embeds": RNG.standard_normal((101, 2, 3))}
    monkeypatch.setattr(prompts, "GROUP_BYTES", 400)
    path = write_prompts(tmp_path / "p.parquet", big)
    monkeypatch.setattr(prompts, "CACHED_BYTES", 2000)
    assert pq.ParquetFile(path).num_row_groups > 12
    table = PromptTable(path)
    whole = table.rows(40, 150)
    parts = [table.rows(k, 1) for k in range(40, 190)]
    for name, values in big.items():
        assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts]))
        assert np.array_equal(whole[name], values[np.arange(40, 190) % 101])
    assert 2 < len(table._cache) and sum(table.groups[kept].size for kept in table._cache) <= 2000
    mixed = RNG.permutation(101)[:60]
    assert np.array_equal(table.take(mixed)["label"], mixed) and len(table.take(mixed[:0])["embeds"]) == 0
    for wrong in ([101], [3, -1]):
        with pytest.raises(IndexError):
            table.take(np.array(wrong))
    again = PromptTable(path)  # a seek needs nothing before it
    assert np.array_equal(again.rows(77, 3)["embeds"], big["embeds"][77:80]) and len(again._cache) == 1


def test_a_folder_of_files_is_one_table_in_the_order_of_names(tmp_path):
    for number, name in enumerate(["b", "a", "c"]):
        write_prompts(tmp_path / f"{name}.parquet", {"label": np.arange(3) + 10 * number})
    (tmp_path / "readme.txt").write_text("not a table")
    assert PromptTable(tmp_path).rows(0, 10)["label"].tolist() == [10, 11, 12, 0, 1, 2, 20, 21, 22, 10]
    assert PromptTable(tmp_path.as_uri()).rows(4, 1)["label"].tolist() == [1]


def test_tables_that_others_wrote(tmp_path):
    values = np.arange(12.0).reshape(3, 2, 2)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    lists = pa.array([[1, 2], [3, 4], [5, 6]])
    columns = {"tensors": tensors, "lists": lists, "nested": pa.array(values.tolist())}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    rows = PromptTable(tmp_path / "t.parquet").rows(2, 2)
    assert np.array_equal(rows["tensors"], values[[2, 0]]) and np.array_equal(rows["nested"], values[[2, 0]])
    assert rows["lists"].tolist() == [[5, 6], [1, 2]]

    pq.write_table(pa.table({"ragged": pa.array([[1, 2], [3], [4]]), "gaps": [1, None, 2]}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="'ragged' .* unequal lengths"):
        PromptTable(tmp_path / "bad.parquet", ["ragged"]).rows(0, 1)
    with pytest.raises(UserError, match="'gaps' .* without a value"):
        PromptTable(tmp_path / "bad.parquet", ["gaps"]).rows(0, 1)
    pq.write_table(pa.table({"x": pa.array([[1, 2], [3, 4]] + [[5]] * 2)}), tmp_path / "g.parquet", row_group_size=2)
    with pytest.raises(UserError, match="'x' .* unequal lengths"):
        PromptTable(tmp_path / "g.parquet").rows(1, 2)


def test_mistakes_are_said_in_a_line(table_path, tmp_path):
    def refused(message, path, columns=None):
        with pytest.raises(UserError, match=message) as error:
            PromptTable(path, columns)
        assert "\n" not in str(error.value) and str(error.value).startswith("prompts: ")

    refused("no file .*did you mean 'prompts.parquet'", tmp_path / "prompt.parquet")
    refused("no file '/nowhere/p.parquet'$", "/nowhere/p.parquet")
    refused("no column 'labels'; did you mean 'label'", table_path, ["labels"])
    (tmp_path / "text.parquet").write_text("label\n1\n")
    refused("not a Parquet file", tmp_path / "text.parquet")
    (tmp_path / "empty").mkdir()
    refused("has no .parquet file", tmp_path / "empty")
    pq.write_table(pa.table({"label": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    refused("has no rows", tmp_path / "none.parquet")
    refused("cannot reach 'nothing://x/y'", "nothing://x/y")
    for start, count in [(-1, 1), (0, -1)]:
        with pytest.raises(ValueError, match="from 0"):
            PromptTable(table_path).rows(start, count)
    for rows in [{}, {"a": np.arange(2), "b": np.arange(3)}, {"a": np.arange(0)}]:
        with pytest.raises(ValueError, match="one and the same length"):
            write_prompts(tmp_path / "w.parquet", rows)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") or p.name == "w.parquet"]


def test_embedded_prompts(tmp_path):
    path = ensure_embedded_prompts(DigitsFamily(), tmp_path / "new")
    table = PromptTable(path, DigitsFamily().condition_columns)
    assert len(table) == 1797
    assert np.array_equal(table.rows(0, 1797)["label"], sklearn_digits().target)
    before = path.stat().st_mtime_ns
    assert ensure_embedded_prompts("digits", tmp_path / "new") == path and path.stat().st_mtime_ns == before
    ring_path = ensure_embedded_prompts("ring", tmp_path)
    assert PromptTable(ring_path).rows(1022, 4)["index"].tolist() == [1022, 1023, 0, 1]
    assert PromptTable(ring_path, []).rows(5, 4) == {}
    with pytest.raises(UserError, match="family 'wan' ships no prompts"):
        ensure_embedded_prompts("wan", tmp_path)


def test_digits():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1
    data = sklearn_digits()
    assert np.array_equal(((images[:, 0] + 1) * 8).numpy(), data.images) and np.array_equal(labels.numpy(), data.target)
    assert abs(images.mean() + 0.39) < 0.01 and abs(images.std() - 0.75) < 0.01
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    assert len(train) == len(train_labels) == 1438 and len(test) == len(test_labels) == 359
    assert torch.equal(test, images[4::5]) and torch.equal(test_labels, labels[4::5])
    seen = {picture.numpy().tobytes() for picture in train}
    assert len(seen & {picture.numpy().tobytes() for picture in test}) == 0
    assert len(set(test_labels.tolist())) == len(set(train_labels.tolist())) == 10


def test_ring_is_drawn_by_key_and_index():
    points = ring.sample(64, Key(3, 1, "x", 2))
    assert points.shape == (64, 2) and points.dtype == torch.float32
    assert torch.equal(ring.sample(10, Key(3, 1, "x", 2), start=20), points[20:30])
    assert torch.equal(ring.sample(4, 5), ring.sample(4, 5))
    for other in (Key(4, 1, "x", 2), Key(3, 2, "x", 2), Key(3, 1, "y", 2), Key(3, 1, "x", 3)):
        assert not torch.isclose(ring.sample(64, other), points).any(dim=1).any()
        assert (ring.nearest_mode(ring.sample(64, other)) != ring.nearest_mode(points)).sum() > 32  # modes too


def test_ring_has_the_law_that_it_states():
    points, weights, means = ring.sample(40_000, 1).double(), ring.mode_weights(), ring.mode_means()
    assert abs(weights.sum() - 1) < 1e-12 and weights.max() > 3 * weights.min()
    sizes = (weights * (1 - weights) / len(points)).sqrt()
    shares = ring.mode_shares(points)
    assert ((shares - weights).abs() < 4 * sizes).all()
    assert not ((shares - 1 / 8).abs() < 4 * sizes).all()  # not the equal ring
    mode = ring.nearest_mode(points)
    assert torch.equal(ring.nearest_mode(means), torch.arange(8))
    offsets = points - means[mode]
    assert abs(offsets.std() / ring.STD - 1) < 0.01 and offsets.mean(0).abs().max() < 4 * ring.STD / math.sqrt(40_000)
    assert offsets.norm(dim=1).max() < 0.6  # modes are 1.15 apart: nearest is right
    truth = (weights[:, None] * means).sum(0)
    assert torch.allclose(points.mean(0), truth, atol=0.03) and truth.norm() > 0.5  # off-centre
    assert 0.9 < points.std(0).min() and points.std(0).max() < 1.2
