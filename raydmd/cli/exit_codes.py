"""How a command ends: its exit code, and the line for whoever typed it."""

import click

from raydmd import interrupts
from raydmd.atomic import FULL, storage_error
from raydmd.cli.commands import app
from raydmd.console import console, errors
from raydmd.errors import RunError, UserError


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code. Used by the jobs, too."""
    try:
        return int(app(arguments, prog_name="raydmd", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        console.print(error.format_message(), highlight=False, markup=False, soft_wrap=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        code, words = _end(error)
        errors.print(f"raydmd: {words}", highlight=False, markup=False, soft_wrap=True)
        return code


def _end(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line of a command that ended with an error; raise one that nobody foresaw."""
    if (failure := interrupts.failure()) is not None:
        return 1, str(failure)
    if interrupts.raised() or isinstance(error, KeyboardInterrupt | click.Abort):  # whatever it was turned into
        return interrupts.exit_code(), "interrupted"
    if isinstance(error, click.ClickException):
        return 2, " ".join(error.format_message().split())
    if isinstance(error, UserError):
        return 2, " ".join(str(error).split())
    if isinstance(error, RunError):
        return 1, str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):  # else a terminal's, too
        if (known := storage_error(error.filename or "a disk", error)) is not None:
            return 1, str(known)
        return 2, f"{error.filename}: {error.strerror}"
    raise error
