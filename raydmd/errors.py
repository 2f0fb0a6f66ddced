"""Errors that end a command: the user's to mend (exit code 2), or a run that broke (1). One line, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: its message is one line naming the key, file or value."""


class RunError(Exception):
    """A run that ended for another reason than the user's input: one line, exit code 1; details lie in a file."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice closest to ``word``, else what the choices are."""
    choices = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f" (one of: {', '.join(choices)})" if choices else ""
