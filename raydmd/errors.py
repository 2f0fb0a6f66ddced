"""Errors that are the user's to mend: one line, exit code 2, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: its message is one line naming the key, file or value."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice closest to ``word``, else what the choices are."""
    choices = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f" (one of: {', '.join(choices)})" if choices else ""
