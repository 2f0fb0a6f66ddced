"""Where a command begins: signals and streams are taken before anything that takes time is imported."""

import os
import sys

from raydmd import interrupts

AGENTS_S = 5.0  # Ray's processes have so long to end by themselves


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code: 0, 1 (a run that broke), 2 (bad input), 130 or 143 (a signal)."""
    try:
        interrupts.install()
        from raydmd.console import flush_streams, hold_streams

        hold_streams()
        from raydmd.cli import run

        code = run(arguments)
        interrupts.ending()
    except KeyboardInterrupt:  # while modules are imported
        os.write(2, b"raydmd: interrupted\n")
        interrupts.end_at_once(interrupts.exit_code())
    flush_streams()
    interrupts.end_children(0.0 if code in (1, 130, 143) else AGENTS_S)
    if code in (1, 130, 143):
        os._exit(code)  # what is left may wait for a Ray that is gone
    sys.exit(code)
