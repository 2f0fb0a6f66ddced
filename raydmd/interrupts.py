"""Ctrl-C, SIGTERM and SIGHUP: the first ends a command in order, the second at once, whatever it is doing.

A signal's first arrival raises KeyboardInterrupt in the main thread, or calls what `graceful` was given. The exit code
is 130 after Ctrl-C and after SIGHUP (the terminal went away), 143 after SIGTERM.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 130}
UNWIND_S = 30.0  # within which the first signal has ended a command that has nothing to save


class _State:
    """What arrived in this process.

    Attributes:
        installed: whether the signals are this module's for good, as in a command.
        number: the first signal that arrived.
        failure: why the process ends, where another thread found a reason.
        callback: called at the first signal, in place of a KeyboardInterrupt.
        elsewhere: what `graceful` was given in another thread than the main one, which gets no signals.
        raised: whether a KeyboardInterrupt was raised for it.
        ending: whether the command has returned.
    """

    def __init__(self) -> None:
        self.installed = self.raised = self.ending = False
        self.number: int | None = None
        self.failure: Exception | None = None
        self.callback: Callable[[], object] | None = None
        self.elsewhere: Callable[[], object] | None = None


_state = _State()


def install() -> None:
    """Take the three signals, for this process; SIGHUP is left alone where it is ignored (``nohup``)."""
    _state.installed = True
    for number in EXIT_CODES:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _received)
    sys.unraisablehook = _unraisable


def installed() -> bool:
    """Whether the signals are this module's: in a command, not where the package is used as a library."""
    return _state.installed


def received() -> bool:
    """Whether a signal has arrived."""
    return _state.number is not None


def raised() -> bool:
    """Whether a command was interrupted by a KeyboardInterrupt, which clean-ups may have turned into other errors."""
    return _state.installed and _state.raised


@contextmanager
def graceful(callback: Callable[[], object]) -> Iterator[None]:
    """While inside, the first signal calls ``callback`` in the main thread and interrupts nothing.

    Where `install` was not called, as when the package is used as a library, the signals are taken only while inside,
    and a second one raises KeyboardInterrupt. In another thread than the main one, which gets no signals, it is
    `stop_other_thread` that calls ``callback``.
    """
    if threading.current_thread() is not threading.main_thread():
        outer, _state.elsewhere = _state.elsewhere, callback
        try:
            yield
        finally:
            _state.elsewhere = outer
        return
    taken: dict[int, Any] = {}
    if not _state.installed:
        _state.number = None
        taken = {number: signal.signal(number, _received) for number in EXIT_CODES}
    before, _state.callback = _state.callback, callback
    try:
        yield
    finally:
        _state.callback = before
        for number, handler in taken.items():
            signal.signal(number, handler)


def stop_other_thread() -> bool:
    """Call what `graceful` was given in another thread than the main one; return whether there was anything."""
    if (callback := _state.elsewhere) is None:
        return False
    callback()
    return True


def fail(error: Exception) -> bool:
    """From another thread: end what the main thread does by a KeyboardInterrupt, for this reason (see `failure`).

    A main thread that does not come back within UNWIND_S / 6 is not waited for. Returns whether the process's signals
    are this module's: if not, nothing is done.
    """
    if not _state.installed or _state.failure is not None:
        return _state.installed
    _state.failure = error
    os.kill(os.getpid(), signal.SIGINT)
    _end_after(UNWIND_S / 6)
    return True


def failure() -> Exception | None:
    """Return the reason that `fail` was given, if it was called."""
    return _state.failure


def exit_code() -> int:
    """Return the exit code of a command that was interrupted."""
    return EXIT_CODES.get(signal.Signals(_state.number), 130) if _state.number is not None else 130


def ending() -> None:
    """Say that the command has returned: a signal now ends the process without a word."""
    _state.ending = True


def end_children(patience_s: float = 0.0) -> None:
    """End every process that this one started and that is still there, after so many seconds.

    What a command starts (a Ray on this machine and its workers) is its own; of a cluster that it joined nothing is.
    """
    import psutil

    children = psutil.Process().children(recursive=True)
    if patience_s and children:
        _, children = psutil.wait_procs(children, timeout=patience_s)
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            pass


def end_at_once(code: int) -> None:
    """End this process and all that it started, without cleaning up."""
    try:
        end_children()
        from raydmd.console import flush_streams

        flush_streams()
    finally:
        os._exit(code)


def _received(number: int, frame: Any) -> None:
    if _state.failure is not None and number == signal.SIGINT and _state.number is None:
        _state.number = number
        raise KeyboardInterrupt
    if _state.ending or (_state.installed and _state.number is not None):
        _state.number = _state.number if _state.number is not None else number
        _end_with_message()
    again, _state.number = _state.number is not None, number
    if _state.callback is not None and not again:
        _state.callback()
        return
    _state.raised = True
    if _state.installed:
        _end_after(UNWIND_S)
    raise KeyboardInterrupt


def _end_after(seconds: float) -> None:
    """End the process if it is still there after so many seconds: something holds the exception back."""

    def wait() -> None:
        time.sleep(seconds)
        _end_with_message()

    threading.Thread(target=wait, daemon=True).start()


def _end_with_message() -> None:
    """End the process at once; say why on stderr, unless the command has returned and said it already.

    The words go past Python's stream, whose lock the thread that is ended may hold.
    """
    words = str(_state.failure) if _state.failure is not None else "interrupted"
    if not _state.ending:
        try:
            os.write(sys.stderr.fileno(), f"raydmd: {words}\n".encode(errors="backslashreplace"))
        except (AttributeError, OSError, ValueError):  # no stderr, or nobody reads it
            pass
    end_at_once(1 if _state.failure is not None else exit_code())


def _unraisable(unraisable: Any) -> None:
    """End the process at an interrupt that arrived where nothing can be raised (a finalizer), and was dropped there."""
    if unraisable.exc_type is KeyboardInterrupt:
        _end_with_message()
    sys.__unraisablehook__(unraisable)
