"""What to sample for: prompts in turn for pictures and figures, and the prompt that a user gives."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from raydmd.config.recipe import Recipe
from raydmd.data.digits import CLASSES
from raydmd.data.pictures import read_picture
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError, nearest_text
from raydmd.models.base import IMAGE_COLUMN, Conditions, Family
from raydmd.models.encoding import encode_rows, encodes_first_frames, takes_pictures

TEXT_COLUMNS = ("prompt", "text", "caption")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def own_prompts(family: Family) -> tuple[str, ...] | None:
    """Return the only prompts that a family knows; None if its prompts are not its own."""
    return tuple(str(digit) for digit in range(CLASSES)) if family.name == "digits" else None


def in_turn(recipe: Recipe, family: Family, count: int) -> Conditions:
    """Return conditions of ``count`` samples: the digits 0..9 again and again, or the prompt table's rows.

    Raises:
        UserError: a family without prompts of its own, and ``prompts.path`` is not given or not readable.
    """
    if family.name == "digits":
        return family.conditions({"label": np.arange(count) % CLASSES})
    if not family.condition_columns:
        return family.conditions({})
    table = _table(recipe, family)
    return encode_rows(family, table, np.arange(count) % len(table))


def words_in_turn(recipe: Recipe, family: Family, count: int) -> list[str]:
    """Return the prompts of `in_turn`'s samples in words: a column of texts, or the rows' numbers where there is none.

    Empty for families without a table of prompts, and where the table cannot be read.
    """
    if family.name == "digits" or not family.condition_columns or recipe.prompts.path is None:
        return []
    try:
        table = PromptTable(recipe.prompts.path, [])
        rows = np.arange(count) % len(table)
        column = text_column(table.path)
        if column is None:
            return [f"row {row}" for row in rows]
        return [str(text) for text in PromptTable(table.path, [column]).take(rows)[column]]
    except UserError:
        return []


def text_column(path: str) -> str | None:
    """Return the name of a prompt table's column of texts; None if it has none.

    Raises:
        UserError: no such table.
    """
    names = PromptTable(path).columns
    return next((name for name in TEXT_COLUMNS if name in names), None)


def from_text(
    recipe: Recipe,
    family: Family,
    prompt: str,
    count: int,
    given: str = "--prompt",
    device: torch.device | str = "cpu",
    image: Path | None = None,
) -> Conditions:
    """Return conditions of ``count`` samples of one prompt.

    Digits take ``0`` .. ``9``; the ring takes anything. Other families take any text where the teacher's text encoder
    is at hand. Else they are conditioned on embeddings made beforehand: there the prompt is a row's number in
    ``prompts.path``, or its text if the table has a column of texts. Families from image to video take any text with
    an image.

    Args:
        recipe: the run's.
        family: the recipe's.
        prompt: the text.
        count: how many.
        given: what the prompt is called in errors.
        device: of the text encoder.
        image: a picture, the first frame of families from image to video.

    Raises:
        UserError: a prompt that is not there; the message names the right ones. An image that cannot be read, or that
            the family does not take.
    """
    if image is not None:
        return from_first_frame(family, prompt, _read_first_frame(family, image), count, device)
    if family.name == "digits":
        word = prompt.strip().lower()
        if word in WORDS:
            raise UserError(f"{given} {prompt}: digits are asked for by figure: {WORDS.index(word)}")
        if not (word.isascii() and word.isdigit() and len(word) == 1):
            raise UserError(f"{given} {prompt}: a run on digits takes 0, 1, .. or {CLASSES - 1}")
        return family.conditions({"label": np.full(count, int(word))})
    if not family.condition_columns:
        return family.conditions({})
    if family.reads_text:
        rows = family.encode_prompts([prompt], device)
    else:
        if recipe.prompts.path is None and encodes_first_frames(family):
            raise UserError(f"--image: family '{family.name}' begins at a picture here; name the first frame's file")
        table = _table(recipe, family)
        try:
            rows = table.rows(known_row(table, prompt, given), 1)
        except UserError as error:
            more = "; a prompt of your own comes with a first frame: --image FILE" if takes_pictures(family) else ""
            raise UserError(f"{error}{more if given == '--prompt' else ''}") from None
    return family.conditions({name: np.repeat(values, count, axis=0) for name, values in rows.items()})


@torch.no_grad()
def from_first_frame(
    family: Family,
    prompt: str,
    pixels: np.ndarray,
    count: int = 1,
    device: torch.device | str = "cpu",
    texts: Family | None = None,
) -> Conditions:
    """Return conditions of ``count`` samples of a text and a first frame, as those of captioned pictures are made.

    Args:
        family: at the samples' size.
        prompt: the text.
        pixels: of the first frame, uint8 [3, height, width] of that size.
        count: how many.
        device: of the text encoder and the VAE.
        texts: the same family where it has its text encoder loaded; default: ``family``.
    """
    frame = torch.from_numpy(pixels)[None].to(device).float() / 127.5 - 1
    made = family.encode_first_frames(frame).float().cpu().numpy()
    rows = {**(texts or family).encode_prompts([prompt], device), IMAGE_COLUMN: made}
    one_size = family.without_buckets()
    return one_size.conditions({name: np.repeat(values, count, axis=0) for name, values in rows.items()})


def _read_first_frame(family: Family, image: Path) -> np.ndarray:
    """Return a file's picture at the family's size, uint8 [3, height, width]."""
    if not takes_pictures(family):
        raise UserError(f"--image {image}: family '{family.name}' takes no first frame here; leave it out")
    family.check_encoder("--image")
    width, height = family.picture_size
    try:
        return read_picture(image, (3, height, width))
    except Exception as error:  # whatever Pillow's decoders make of bytes that are not what they expect
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
        raise UserError(f"--image {image}: it cannot be read as a picture: {why or type(error).__name__}") from None


def read_prompt_file(path: Path, given: str = "--prompts") -> list[str]:
    """Return a file's prompts: a line each, or by its ending the column of texts of CSV, JSON lines or Parquet.

    A column of texts is called ``prompt``, ``text`` or ``caption``; a JSON line may be a text itself.

    Raises:
        UserError: it is not there, cannot be read, or has no prompt or no such column in it.
    """
    rows: list[Any]
    try:
        if path.suffix == ".parquet":
            table = parquet.ParquetFile(path)
            name = next((name for name in TEXT_COLUMNS if name in table.schema_arrow.names), None)
            rows = table.read([name] if name else []).to_pylist()
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                if path.suffix == ".csv":
                    rows = list(csv.DictReader(file))
                elif path.suffix == ".jsonl":
                    rows = [json.loads(line) for line in file if line.strip()]
                else:
                    rows = [line.strip() for line in file]
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
        raise UserError(f"{given} {path}: {why}") from None
    prompts = []
    for number, row in enumerate(rows, start=1):
        name = next((name for name in TEXT_COLUMNS if name in row), None) if isinstance(row, dict) else None
        text = row[name] if name else row
        if not isinstance(text, str):
            place = "the header" if path.suffix == ".csv" and name is None else f"row {number}"
            raise UserError(f"{given} {path}: {place} has no {', '.join(TEXT_COLUMNS)}")
        if text.strip():
            prompts.append(text.strip())
    if not prompts:
        raise UserError(f"{given} {path}: there is no prompt in it")
    return prompts


def _table(recipe: Recipe, family: Family) -> PromptTable:
    if recipe.prompts.path is None:
        raise UserError(f"prompts.path: family '{family.name}' needs a Parquet file of encoded prompts")
    return PromptTable(recipe.prompts.path, family.condition_columns)


def known_row(table: PromptTable, prompt: str, given: str) -> int:
    """Return the number of a prompt's row in a table: its own figure, or that of its text.

    Args:
        table: the table; its columns do not matter.
        prompt: what is asked for.
        given: what the prompt is called in errors.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if prompt.isascii() and prompt.isdigit():
        if len(prompt) <= 18 and int(prompt) < len(table):
            return int(prompt)
        raise UserError(f"{given} {prompt}: '{table.path}' has rows 0..{len(table) - 1}")
    name = text_column(table.path)
    if name is not None:
        texts = [str(text) for text in PromptTable(table.path, [name]).rows(0, len(table))[name]]
        if prompt in texts:
            return texts.index(prompt)
        hint = nearest_text(prompt, texts)
        raise UserError(f"{given} {prompt}: no such text in column '{name}' of '{table.path}'{hint}")
    rows = f"0..{len(table) - 1}"
    raise UserError(f"{given} {prompt}: '{table.path}' has no column of texts; give a row's number, {rows}")
