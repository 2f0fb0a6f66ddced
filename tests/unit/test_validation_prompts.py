"""`monitor.prompts`: previews of the prompts that the recipe names, in turn, found in the table or encoded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydmd.data.prompts import write_prompts
from raydmd.errors import UserError
from raydmd.evaluation.validation_prompts import check_validation_prompts, preview_words, validation_conditions
from raydmd.methods.loading import load_recipe
from raydmd.models.diffusers.wan import WanFamily
from raydmd.models.tiny import TINY_MODELS
from raydmd.recipe_check import absolute
from raydmd.runs.run import recipe_family
from raydmd.runtime.prompts import PromptStream

TEXTS = ["a red fox", "two green birds", "the sea at night"]


def made(*overrides: str) -> tuple[Any, Any]:
    recipe = load_recipe("digits", overrides)
    return recipe, recipe_family(recipe)


def wan(folder: Path, prompts: str, texts: bool = True) -> tuple[Any, Any]:
    tiny = TINY_MODELS["wan"]
    rows: dict[str, Any] = {**tiny.rows(3), **({"prompt": TEXTS} if texts else {})}
    path = write_prompts(folder / "prompts.parquet", rows)
    (folder / "r.yaml").write_text(
        f"teacher: {{family: wan, options: {dict(tiny.options)}}}\n"
        f"prompts: {{path: {path}}}\nmethod: {{name: phased}}\n"
    )
    recipe = load_recipe(str(folder / "r.yaml"), [f"monitor.prompts={prompts}"])
    return recipe, recipe_family(recipe)


def test_labels_in_turn() -> None:
    recipe, family = made("monitor.prompts=[3, '7']")
    found = validation_conditions(recipe, family, 5)
    assert found is not None and found["label"].tolist() == [3, 7, 3, 7, 3]
    assert preview_words(recipe, family, 3) == ["3", "7", "3"]
    assert validation_conditions(*made(), 5) is None


@pytest.mark.parametrize("prompts", ["[2, the sea at night, 0]", "[the sea at night, 2, 0]"])
def test_rows_and_texts_of_the_table(tmp_path: Path, prompts: str) -> None:
    recipe, family = wan(tmp_path, prompts)
    check_validation_prompts(recipe, family)
    found = validation_conditions(recipe, family, 4)
    rows = TINY_MODELS["wan"].rows(3)["prompt_embeds"]
    assert found is not None and torch.equal(found["prompt_embeds"], torch.from_numpy(rows[[2, 2, 0, 2]]))
    assert set(preview_words(recipe, family, 3)) == {"row 2", "the sea at night", "row 0"}


def test_a_file_of_texts_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "validation.txt").write_text("two green birds\n\na red fox\n")
    monkeypatch.chdir(tmp_path)
    recipe, family = wan(tmp_path, "validation.txt")
    recipe = absolute(recipe)
    monkeypatch.chdir("/")
    assert recipe.monitor.prompts == str(tmp_path / "validation.txt")
    found = validation_conditions(recipe, family, 2)
    rows = TINY_MODELS["wan"].rows(3)["prompt_embeds"]
    assert found is not None and torch.equal(found["prompt_embeds"], torch.from_numpy(rows[[1, 0]]))
    assert preview_words(recipe, family, 3) == ["two green birds", "a red fox", "two green birds"]
    (tmp_path / "validation.txt").unlink()
    assert preview_words(recipe, family, 3) == []


def test_prompts_that_are_texts_are_looked_up_before_they_are_encoded(tmp_path: Path) -> None:
    recipe, family = wan(tmp_path, "[two green birds, 2]")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    prompts = recipe.prompts.model_copy(update={"path": str(tmp_path / "texts.txt")})
    recipe = recipe.model_copy(update={"prompts": prompts})
    check_validation_prompts(recipe, family)
    for wrong, words in ((["two green bird"], "no such text in .*texts.txt'"), ([3], r"has rows 0\.\.2")):
        monitor = recipe.monitor.model_copy(update={"prompts": wrong})
        with pytest.raises(UserError, match=words):
            check_validation_prompts(recipe.model_copy(update={"monitor": monitor}), family)


def test_what_is_not_in_the_table_is_encoded_where_that_can_be(tmp_path: Path) -> None:
    class Encoding(WanFamily):
        asked: list[str] = []

        @property
        def reads_text(self) -> bool:
            return True

        def encode_prompts(self, prompts: Any, device: Any = "cpu") -> dict[str, np.ndarray]:
            self.asked += prompts
            rows = np.stack([np.full((7, 16), len(text), np.float32) for text in prompts])
            return {"prompt_embeds": rows, "negative_prompt_embeds": 0 * rows}

    recipe, family = wan(tmp_path, "[a red fox, two red foxes]")
    encoding = Encoding(None, dict(family.options))
    found = validation_conditions(recipe, encoding, 3)
    assert encoding.asked == ["a red fox", "two red foxes"]  # both, so that they are of one length
    assert found is not None and found["prompt_embeds"][:, 0, 0].tolist() == [9, 13, 9]
    validation_conditions(wan(tmp_path, "[a red fox]")[0], encoding, 3)
    assert len(encoding.asked) == 2  # the table has it


def test_the_prompt_stream_hands_them_out(tmp_path: Path) -> None:
    recipe, family = wan(tmp_path, "[1]")
    stream = PromptStream(recipe, recipe.prompts.path)
    assert np.array_equal(stream.previews(2)["prompt_embeds"], TINY_MODELS["wan"].rows(3)["prompt_embeds"][[1, 1]])
    plain = PromptStream(wan(tmp_path, "null")[0], recipe.prompts.path)
    assert np.array_equal(plain.previews(2)["prompt_embeds"], TINY_MODELS["wan"].rows(3)["prompt_embeds"][:2])


@pytest.mark.parametrize(
    ("prompts", "texts", "words"),
    [
        ("[3]", True, "monitor.prompts: 3: .* has rows 0..2"),
        ("[a red foks]", True, "monitor.prompts: 'a red foks': no such text in .*did you mean 'a red fox'"),
        ("[a red fox]", False, "monitor.prompts: 'a red fox': .* has no column of texts, .* give rows' numbers, 0..2"),
        ("nowhere.txt", True, "monitor.prompts: nowhere.txt: No such file"),
    ],
)
def test_what_is_nowhere_is_refused(tmp_path: Path, prompts: str, texts: bool, words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}"):
        check_validation_prompts(*wan(tmp_path, prompts, texts))


def test_what_a_family_does_not_take_is_refused() -> None:
    with pytest.raises(UserError, match="^monitor.prompts: cat: a run on digits takes 0, 1"):
        check_validation_prompts(*made("monitor.prompts=[cat]"))
    ring = load_recipe("ring", ["monitor.prompts=[cat]"])
    with pytest.raises(UserError, match="^monitor.prompts: family 'ring' has no prompts"):
        check_validation_prompts(ring, recipe_family(ring))


@pytest.mark.parametrize(
    ("value", "words"),
    [("[]", "at least one prompt"), ("[-1]", "not -1"), ("[true]", "not True"), ("7", "a list of texts"), ("['']", "")],
)
def test_a_recipe_says_what_they_are(value: str, words: str) -> None:
    with pytest.raises(UserError, match=r"--set monitor\.prompts=.*: monitor\.prompts: ") as caught:
        load_recipe("digits", [f"monitor.prompts={value}"])
    assert words in str(caught.value) and "\n" not in str(caught.value)
