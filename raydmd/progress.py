"""How far a command is: a bar or a line that changes on a terminal, lines with the time in a log; all on stderr."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raydmd.console import errors

TENTHS = 10  # lines of a log, at most


def time_left(count: int, seconds: Collection[float]) -> str:
    """Say how long ``count`` more will take, by how long some took that were of late: ``about 1:02:03 left``."""
    mean = sum(seconds) / len(seconds) if seconds else 0.0
    return f"about {timedelta(seconds=round(count * mean))} left"


@contextmanager
def counting(what: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Show how many of ``total`` are done; what is yielded is to be called after each."""
    console = console or errors
    began, done = time.monotonic(), 0
    columns = (
        TextColumn(f"[bold]{what}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def one() -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            if not console.is_terminal and done < total and done % max(total // TENTHS, 1) == 0:
                left = time_left(total - done, [(time.monotonic() - began) / done])
                console.print(f"{what} {done}/{total}, {left}", highlight=False, soft_wrap=True)

        yield one


@contextmanager
def telling(what: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show what is being done; what is yielded is to be told in a few words."""
    console, began = console or errors, time.monotonic()
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda words: status.update(f"{what}: {words}")
    else:
        yield lambda words: console.print(
            f"{what}: {words} (after {timedelta(seconds=round(time.monotonic() - began))})",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
