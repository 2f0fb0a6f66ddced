"""Whether the Ray under a command is still there: its raylet on this machine and its control store."""

import socket
import subprocess
import threading
import time

from raydmd import interrupts
from raydmd.errors import RunError
from raydmd.runtime.ray_compat import joined_ports, node_processes

EVERY_S = 0.25
ASK_EVERY_S = 2.0  # a cluster that was joined
GIVE_UP_S = 6.0  # without an answer of it


class RayHealthMonitor(threading.Thread):
    """Looks after Ray's own processes, beside the main thread; without them its calls would wait for ever.

    Of a Ray that was started here it watches the processes; of one that was joined it asks whether they still take
    connections. When one is lost, the main thread is interrupted (in a command; see `interrupts.fail`), and `error`
    says why.

    Args:
        ports: where the parts of a cluster that was joined listen; None: found when it is started.

    Attributes:
        lost: what is gone; None: nothing.
    """

    def __init__(self, ports: dict[str, tuple[str, int]] | None = None) -> None:
        super().__init__(daemon=True, name="raydmd-ray-health")
        self.lost: str | None = None
        self._stopped = threading.Event()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = ports or {}
        self._heard: dict[str, float] = {}
        self._asked = 0.0

    def error(self) -> RunError | None:
        """Look now; return the error that a lost Ray is, if it is lost."""
        if self.lost is None:
            self.lost = next((name for name, p in self._processes.items() if p.poll() is not None), None)
        if self.lost is None:
            return None
        return RunError(f"Ray's {self.lost} was lost; the same command goes on (what Ray says is in run.log)")

    def start(self) -> None:
        """Begin to look after the Ray that this process is connected to."""
        if not self._ports:
            self._processes = node_processes()
            self._ports = {} if self._processes else joined_ports()
        self._heard = dict.fromkeys(self._ports, time.monotonic())
        super().start()

    def run(self) -> None:
        """Look until stopped, or until something is lost."""
        while not self._stopped.wait(EVERY_S):
            if self._ports and time.monotonic() - self._asked > ASK_EVERY_S:
                self._ask()
            error = self.error()
            if error is not None and not self._stopped.is_set():
                interrupts.fail(error)
                return

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _ask(self) -> None:
        self._asked = time.monotonic()
        for name, address in self._ports.items():
            try:
                socket.create_connection(address, timeout=ASK_EVERY_S).close()
                self._heard[name] = time.monotonic()
            except OSError:
                if time.monotonic() - self._heard[name] > GIVE_UP_S:
                    self.lost = f"{name} at {address[0]}:{address[1]}"
