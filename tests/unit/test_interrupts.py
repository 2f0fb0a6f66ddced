"""A command that a signal ends says so, wherever the signal arrived."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import default_signals

ROOT = Path(__file__).parents[2]

DROPPED = """
import os, signal
from raydmd import interrupts
interrupts.install()
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10))
Finalized()
while True:
    pass
"""
HELD_BACK = """
import os, signal, time
from raydmd import interrupts
interrupts.UNWIND_S = 0.2
interrupts.install()
while True:
    try:
        os.kill(os.getpid(), signal.SIGTERM) if not interrupts.received() else time.sleep(1)
    except KeyboardInterrupt:
        pass
"""
TWICE = """
import os, signal, time
from raydmd import interrupts
interrupts.install()
try:
    os.kill(os.getpid(), signal.SIGHUP)
finally:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
RETURNED = """
import os, signal
from raydmd import interrupts
interrupts.install()
interrupts.ending()
os.kill(os.getpid(), signal.SIGINT)
"""
FAILED = """
import threading, time
from raydmd import interrupts
interrupts.UNWIND_S = 1.0
interrupts.install()
try:
    threading.Thread(target=interrupts.fail, args=(RuntimeError("the control store is gone"),)).start()
    time.sleep(60)
finally:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        pytest.param(DROPPED, 130, "raydmd: interrupted\n", id="where nothing can be raised"),
        pytest.param(HELD_BACK, 143, "raydmd: interrupted\n", id="something holds it back"),
        pytest.param(TWICE, 130, "raydmd: interrupted\n", id="a second signal"),
        pytest.param(RETURNED, 130, "", id="after the command's own words"),
        pytest.param(FAILED, 1, "raydmd: the control store is gone\n", id="another thread's reason"),
    ],
)
def test_an_end_at_once_says_why(program: str, code: int, words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, preexec_fn=default_signals,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, words)
