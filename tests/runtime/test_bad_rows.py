"""A row of the prompts that cannot be used: found when it is read or encoded, named by column and row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_large_families import LENGTH, ROWS, WIDTH, large_recipe, run_large

from raydmd.data import prompts as tables
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.errors import UserError
from raydmd.models.embedded.digits import DigitsFamily
from raydmd.models.embedded.ring import RingFamily
from raydmd.models.encoding import encode, encode_rows
from raydmd.recipe_check import check


def columns(bad: int | None = None, value: float = np.nan, column: str = "prompt_embeds") -> dict[str, np.ndarray]:
    rng, mask = np.random.default_rng(0), np.ones((ROWS, LENGTH), dtype=np.int64)
    made = {name: rng.standard_normal((ROWS, LENGTH, WIDTH)) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if bad is not None:
        made[column][bad, 2, 3] = value
    return {**made, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.copy()}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("column", ["prompt_embeds", "negative_prompt_embeds"])
def test_a_number_that_is_none_is_found_before_the_run(tmp_path: Path, value: float, column: str) -> None:
    recipe = large_recipe("wan", tmp_path)
    write_prompts(tmp_path / "prompts.parquet", columns(4, value, column))
    with pytest.raises(UserError, match=f"row 4 of '.*prompts.parquet' .*not finite in column '{column}'") as caught:
        check(recipe)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"row 4 of .* column '{column}'"):
        run_large(recipe)
    write_prompts(tmp_path / "prompts.parquet", columns())
    check(recipe)


def test_a_number_that_its_encoding_cannot_hold(tmp_path: Path) -> None:
    recipe = large_recipe("qwen_image", tmp_path)
    write_prompts(tmp_path / "prompts.parquet", columns(3, 1e300))  # float64 has it, float32 has not
    with pytest.raises(UserError, match="'prompt_embeds' of row 3 of '.*' is not finite once it is encoded"):
        check(recipe)


def test_rows_are_numbered_over_groups_and_files_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 100)
    for number in range(3):
        values = np.zeros((20, 2), np.float16)
        values[13 if number == 1 else 0, 1] = np.inf if number == 1 else 1.0
        write_prompts(tmp_path / f"{number}.parquet", {"x": values, "text": [f"{number}.{i}" for i in range(20)]})
    table = PromptTable(tmp_path, ["x"])
    assert len(table.groups) > 6
    with pytest.raises(UserError, match="row 33 of .* 'x'"):
        table.take(np.array([59, 2, 33, 5]))
    assert len(table.take(np.array([59, 2, 5]))["x"]) == 3  # others can be read
    assert PromptTable(tmp_path, ["text"]).take(np.array([33]))["text"].tolist() == ["1.13"]


def test_what_the_family_refuses_is_named_by_row_where_others_are_well(tmp_path: Path) -> None:
    labels = np.arange(30) % 10
    labels[17] = 12
    table = PromptTable(write_prompts(tmp_path / "p.parquet", {"label": labels}))
    with pytest.raises(UserError, match=r"column 'label' .*12 \(row 17\)"):
        encode_rows(DigitsFamily(), table, np.arange(29, 5, -1))
    with pytest.raises(UserError, match=r"column 'label' .*float64$"):  # of the column, not of a row
        encode(DigitsFamily(), {"label": np.zeros(3)}, np.arange(3), "p")
    with pytest.raises(UserError, match="no column 'label'[^(]*$"):
        encode(DigitsFamily(), {"lable": np.zeros(3)}, np.arange(3), "p")
    assert encode(RingFamily(), {}, np.arange(3), "p") == {}
    assert torch.equal(encode_rows(DigitsFamily(), table, np.array([3, 2]))["label"], torch.tensor([3, 2]))
