"""The prompts of a run's previews, `monitor.prompts`: the same ones, and the same noise, from the first to the last."""

from pathlib import Path

import numpy as np
import torch

from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError, nearest_text
from raydmd.evaluation.prompts import from_text, own_prompts, read_prompt_file, text_column, words_in_turn
from raydmd.models.base import Conditions, Family
from raydmd.models.encoding import encode_rows, texts_for

KEY = "monitor.prompts"


def check_validation_prompts(recipe: Recipe, family: Family) -> None:
    """Refuse prompts that a family does not take, or that are nowhere, before a run; no text is encoded.

    Raises:
        UserError: ``monitor.prompts: ...``: one line that names the prompt.
    """
    prompts = _given(recipe)
    if prompts is None:
        return
    if not family.condition_columns:
        raise UserError(f"{KEY}: family '{family.name}' has no prompts")
    if own_prompts(family) is not None:
        for prompt in prompts:
            from_text(recipe, family, str(prompt), 1, f"{KEY}:")
    elif not _encoded_as_text(recipe, family, prompts):
        _rows(recipe, family, prompts)


def validation_conditions(recipe: Recipe, family: Family, count: int) -> Conditions | None:
    """Return what the ``count`` samples of a preview are conditioned on, [count, ...] by name: the prompts in turn.

    Texts are looked up in the table of prompts, or else encoded, where the teacher has a text encoder.

    Returns:
        None where the recipe names no prompts.

    Raises:
        UserError: as `check_validation_prompts`.
    """
    prompts = _given(recipe)
    if prompts is None:
        return None
    check_validation_prompts(recipe, family)
    if own_prompts(family) is not None:
        each = [from_text(recipe, family, str(prompt), 1, f"{KEY}:") for prompt in prompts]
        conditions = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    elif _encoded_as_text(recipe, family, prompts):
        conditions = family.conditions(family.encode_prompts([str(prompt) for prompt in prompts]))
    else:
        table = PromptTable(str(recipe.prompts.path), family.condition_columns)
        conditions = encode_rows(family, table, _rows(recipe, family, prompts))
    turn = torch.arange(count) % len(prompts)
    return {name: value[turn] for name, value in conditions.items()}


def preview_words(recipe: Recipe, family: Family, count: int) -> list[str]:
    """Return the prompts of a preview's samples in words; those of `words_in_turn` where the recipe names none."""
    try:
        prompts = _given(recipe)
    except UserError:  # the file was there when the run began
        return []
    if prompts is None:
        return words_in_turn(recipe, family, count)
    number = "row " if own_prompts(family) is None else ""
    words = [f"{number}{prompt}" if isinstance(prompt, int) else prompt for prompt in prompts]
    return [words[index % len(words)] for index in range(count)]


def _given(recipe: Recipe) -> list[str | int] | None:
    given = recipe.monitor.prompts
    if isinstance(given, str):
        return [*read_prompt_file(Path(given), f"{KEY}:")]
    return None if given is None else list(given)


def _encoded_as_text(recipe: Recipe, family: Family, prompts: list[str | int]) -> bool:
    """Whether prompts are texts for the teacher's text encoder: all of them, and not all in the table."""
    if not family.reads_text or not all(isinstance(prompt, str) for prompt in prompts):
        return False
    known = set(_texts(recipe, family) or ())
    return not known.issuperset(str(prompt) for prompt in prompts)


def _rows(recipe: Recipe, family: Family, prompts: list[str | int]) -> np.ndarray:
    """Return the numbers of prompts' rows in the table.

    Raises:
        UserError: there is no table, no such row, or no such text.
    """
    if recipe.prompts.path is None:
        raise UserError(f"{KEY}: family '{family.name}' looks them up in prompts.path, and there is none")
    texts, rows = _texts(recipe, family), []
    size = len(PromptTable(recipe.prompts.path, [])) if texts is None else len(texts)
    for prompt in prompts:
        if isinstance(prompt, int):
            if prompt >= size:
                raise UserError(f"{KEY}: {prompt}: '{recipe.prompts.path}' has rows 0..{size - 1}")
            rows.append(prompt)
        elif texts is None:
            raise UserError(f"{KEY}: '{prompt}': '{recipe.prompts.path}' has no column of texts, and the teacher no "
                            f"text encoder; give rows' numbers, 0..{size - 1}")  # fmt: skip
        elif prompt not in texts:
            hint = nearest_text(prompt, texts)
            raise UserError(f"{KEY}: '{prompt}': no such text in '{recipe.prompts.path}'{hint}")
        else:
            rows.append(texts.index(prompt))
    return np.array(rows)


def _texts(recipe: Recipe, family: Family) -> list[str] | None:
    """Return the texts of the file of prompts, or those beside a table's embeddings; None where it has none."""
    path = recipe.prompts.path
    if path is None:
        return None
    if (read := texts_for(family, path, recipe.prompts.column)) is not None:
        return read.texts
    if (column := text_column(path)) is None:
        return None
    table = PromptTable(path, [column])
    return [str(text) for text in table.rows(0, len(table))[column]]
