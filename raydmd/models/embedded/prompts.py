"""The prompts that embedded data sets bring along."""

from pathlib import Path

import numpy as np

from raydmd.data.digits import load_digits
from raydmd.data.prompts import write_prompts
from raydmd.errors import UserError
from raydmd.models.base import Family


def ensure_embedded_prompts(family: Family | str, folder: str | Path) -> Path:
    """Write an embedded data set's prompts as Parquet, unless they are there, and return the path.

    ``digits``: column ``label``, scikit-learn's 1,797 labels in file order. ``ring``: column ``index``, 0..1023.

    Args:
        family: the family or its name.
        folder: where ``<family>.parquet`` goes.

    Raises:
        UserError: a family that has none of its own.
    """
    name = family if isinstance(family, str) else family.name
    path = Path(folder) / f"{name}.parquet"
    if name == "digits":
        if not path.is_file():
            write_prompts(path, {"label": load_digits()[1].numpy()})
    elif name == "ring":
        if not path.is_file():
            write_prompts(path, {"index": np.arange(1024)})
    else:
        raise UserError(f"prompts.path: family '{name}' ships no prompts; give a Parquet file")
    return path
