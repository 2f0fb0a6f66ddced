"""Commands in processes of their own, as a terminal or a service manager starts them, and all that they start."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
from worker_forks import PRELOADED, descendants

ROOT = Path(__file__).parents[2]
DEADLINE = 240.0


def beyond_loopback(processes: list[psutil.Process]) -> tuple[list[tuple[str, str, int]], int]:
    """Return who of these listens beyond loopback, and where; and how many listeners are on loopback."""
    found, here = [], 0
    for process in processes:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    if ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback:
                        here += 1
                    else:
                        found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.Error:
            pass
    return found, here


def default_signals() -> None:
    """Give a command the signals that a terminal's has, whatever these tests run under (`nohup`, a shell's `&`)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Command:
    """`raydmd ...` in a session of its own.

    Args:
        arguments: of the command.
        log: a file that is given stdout and stderr.
        closed: redirections of a shell, such as ``>&- 2>&-``.
        pipe: whether stdout goes to this process instead.
        prefix: words of a program that starts the command, such as a shell's.
        environment: variables besides those that every command gets.
    """

    def __init__(
        self, arguments: list[str], log: Path, closed: str = "", pipe: bool = False, prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:  # fmt: skip
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        kept |= {"PYTHONPATH": f"{PRELOADED}:{ROOT}", "OMP_NUM_THREADS": "1", **environment}
        command = [*prefix, sys.executable, "-m", "raydmd", *arguments]
        if closed:
            command = ["bash", "-c", f'exec "$@" {closed}', "bash", *command]
        self.log, self.began = log, time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE if pipe else output, stderr=output, env=kept,
                start_new_session=True, text=True,
                preexec_fn=default_signals,
            )  # fmt: skip
        self.pid = self.process.pid
        self.seen: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """The command and all that it has started and that is there now; what was ever found is kept in `seen`."""
        if self.process.poll() is not None:
            return []
        try:
            found = [psutil.Process(self.pid), *descendants(psutil.Process(self.pid))]
        except psutil.NoSuchProcess:
            return []
        self.seen |= {process.pid: process for process in found[1:]}
        return found

    def named(self, name: str) -> list[psutil.Process]:
        """Those of the family whose program or title begins so."""
        found = []
        for process in self.family():
            try:
                if process.name() == name or (process.cmdline() or [""])[0].startswith(name):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def until(self, condition: Callable[[], Any], pause: float = 0.02) -> Any:
        """Wait for a condition while the command lives."""
        end = time.monotonic() + DEADLINE
        while not (found := condition()):
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"never came true:\n{self.log.read_text()}"
            time.sleep(pause)
        return found

    def listening_elsewhere(self) -> list[tuple[str, str, int]]:
        """Who of the family listens beyond loopback, and where; there must be somebody who listens at all."""
        found, here = beyond_loopback(self.family())
        assert here, "nobody listens"
        return found

    def ended(self, seconds: float = DEADLINE) -> tuple[int, str]:
        """Wait for its end; return its code and what it wrote."""
        return self.process.wait(seconds), self.log.read_text()

    def outlived(self, seconds: float = 5.0) -> list[str]:
        """Those whom it started, as far as seen, that are still there so many seconds after its end."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        return [f"{process.pid} {process.name()}" for process in alive]


@contextmanager
def command(arguments: list[str], log: Path, **options: Any) -> Iterator[Command]:
    """Start a command; end all of it at the end."""
    started = Command(arguments, log, **options)
    try:
        yield started
    finally:
        started.family()
        for process in (*started.seen.values(), started.process):
            try:
                process.kill()
            except psutil.Error:
                pass
        started.process.wait(60)
        if started.process.stdout is not None:
            started.process.stdout.close()
