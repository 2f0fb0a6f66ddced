"""From rows of a prompt table to what a network is conditioned on; a row that cannot be used is named."""

from collections.abc import Mapping

import numpy as np

from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.models.base import Conditions, Family


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
