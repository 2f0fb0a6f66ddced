"""Errors that end a command: the user's to mend (exit code 2), or a run that broke (1). One line, no traceback."""

import difflib
import pickle
from collections.abc import Iterable, Sequence
from typing import Any


class PortableError(Exception):
    """Base of all errors of this package: pickled with its attributes, whatever its constructor takes.

    `Exception` itself is unpickled by calling the class with ``args``, which fails in the process that receives an
    error whose constructor takes anything but its message.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how it is made anew: without its constructor."""
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[PortableError], args: tuple[Any, ...], attributes: dict[str, Any]) -> PortableError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


def portable(error: Exception) -> Exception:
    """Return an error that another process can unpickle: ``error``, or its words where a library's own cannot be."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class does when it is pickled or made anew
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class UserError(PortableError):
    """A mistake in what the user gave: its message is one line naming the key, file or value."""


class RunError(PortableError):
    """A run that ended for another reason than the user's input: one line, exit code 1; details lie in a file."""


class StorageError(RunError):
    """A disk that is full or gone: what is tried again fails again, so the run ends at once."""


def nearest_text(text: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the text closest to ``text`` of those at the begin, else what there are."""
    close = nearest(text, known[:1000])
    if len(close) <= 200:
        return close
    return f" (one of {len(known)}, e.g. '{known[0][:100]}')" if "did you mean" not in close else f"{close[:198]}'?"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice closest to ``word``, else what the choices are."""
    choices = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f" (one of: {', '.join(choices)})" if choices else ""
