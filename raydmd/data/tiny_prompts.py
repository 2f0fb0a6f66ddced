"""What a tiny teacher's folder has to generate, by its files' names. Imports nothing heavy."""

from pathlib import Path

PROMPTS, TABLE, PICTURES = "prompts.txt", "prompts.parquet", "pictures"
"""Texts, a table of what else the family takes, captioned pictures that videos begin at."""


def tiny_prompts(folder: Path) -> str | None:
    """Return the file or folder; None: there is none, and the family has its own prompts."""
    return next((str(folder / name) for name in (PICTURES, PROMPTS, TABLE) if (folder / name).exists()), None)
