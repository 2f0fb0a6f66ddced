"""From texts to rows of a prompt table, and from rows to what a network is conditioned on; what is wrong is named."""

from collections.abc import Mapping

import numpy as np

from raydmd.data.encoded_table import EncodedFacts
from raydmd.data.prompt_files import KEY, PromptTexts, read_prompt_texts
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.models.base import IMAGE_COLUMN, Conditions, Family
from raydmd.models.fingerprint import fingerprint_encoder

NOT_READ = ("gradient_checkpointing", "subfolder", "latent_shape")  # options that change nothing in an encoded text


def texts_for(family: Family, path: str, column: str | None = None, key: str = KEY) -> PromptTexts | None:
    """Read the texts of a file, or the captions of a folder of pictures, for a family; None where it is a table.

    Args:
        family: that is to encode them.
        path: as `read_prompt_texts` takes it.
        column: of the texts; None: it is found.
        key: of the recipe, or the command's argument, for errors.

    Raises:
        UserError: as `read_prompt_texts`; or the family needs a picture with each text, and there are none.
    """
    texts = read_prompt_texts(path, column, family.condition_columns, key)
    if texts is not None and takes_pictures(family) and texts.pictures is None:
        raise UserError(f"{key}: family '{family.name}' begins at a picture here: a folder of pictures with "
                        f"captions in its metadata is needed, or embeddings with '{IMAGE_COLUMN}', not texts alone "
                        f"as in '{path}'")  # fmt: skip
    return texts


def takes_pictures(family: Family) -> bool:
    """Whether a family's prompt is a text and a picture."""
    return IMAGE_COLUMN in family.condition_columns


def encodes_first_frames(family: Family) -> bool:
    """Whether a text and a picture of one's own can be encoded: text encoder and VAE are there."""
    if not takes_pictures(family):
        return False
    try:
        family.check_encoder("")
    except UserError:
        return False
    return True


def encoded_facts(family: Family, texts: PromptTexts, batch: int) -> EncodedFacts:
    """Return what determines a family's embeddings of some texts. Nothing is loaded.

    Raises:
        UserError: there is no text encoder, or a file or picture cannot be read.
    """
    pictures = takes_pictures(family)
    used = {name: value for name, value in family.options.items() if name not in NOT_READ}
    if pictures:
        used |= {"latent_shape": list(family.latent_shape), "picture_size": list(family.picture_size)}
    return EncodedFacts(
        family=family.name, encoder=fingerprint_encoder(family), texts=texts.digest(pictures), rows=len(texts),
        batch=batch, columns=list(family.condition_columns), options=used,
    )  # fmt: skip


def encode_rows(family: Family, table: PromptTable, rows: np.ndarray) -> Conditions:
    """Read rows by number [count] and encode them, in that order.

    Raises:
        UserError: as `PromptTable.take` and `encode`.
    """
    return encode(family, table.take(rows), rows, table.path)


def encode(family: Family, values: Mapping[str, np.ndarray], rows: np.ndarray, path: str) -> Conditions:
    """Turn columns [count, ...] into the family's conditions.

    Args:
        family: whose conditions they become.
        values: the columns by name.
        rows: the rows' numbers [count] in the table, for errors.
        path: the table's, for errors.

    Raises:
        UserError: a column that does not fit the network, or a row that does not, or whose encoding is not finite; the
            message names the column and, where others are well, the row.
    """
    try:
        conditions = family.conditions(values)
    except UserError as error:
        raise _with_row(family, values, rows, error) from None
    for name, tensor in conditions.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = (~tensor.isfinite()).flatten(1).any(1).nonzero()
            raise UserError(
                f"prompts: '{name}' of row {rows[int(bad[0])]} of '{path}' is not finite once it is encoded"
            )
    return conditions


def _with_row(family: Family, values: Mapping[str, np.ndarray], rows: np.ndarray, error: UserError) -> UserError:
    """Name the first row that is refused by itself, where another one is not."""
    refused: list[tuple[int, UserError]] = []
    for index in range(len(rows)):
        try:
            family.conditions({name: column[index : index + 1] for name, column in values.items()})
        except UserError as own:
            refused.append((index, own))
        if refused and len(refused) <= index:
            return UserError(f"{refused[0][1]} (row {rows[refused[0][0]]})")
    return error
