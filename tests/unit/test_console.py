"""Streams whose other end is gone, closed ones, and where a library's words go."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $raydmd and $python stand for the commands."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=cwd, timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "raydmd": f"{sys.executable} -m raydmd",
             "python": sys.executable},
    )  # fmt: skip


@pytest.mark.parametrize("words", ["recipes digits", "--help"])
def test_nobody_reads(words: str, tmp_path: Path) -> None:
    """Not rich's output, and not click's, ends with a BrokenPipeError, here or when Python ends."""
    done = shell(f"$raydmd {words} | true", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "code"),
    [("recipes <&- >&- 2>&-", 0), ("recipes digit 2>&-", 2), ("--help >/dev/full", 0)],
)
def test_streams_that_are_closed_or_full(words: str, code: int, tmp_path: Path) -> None:
    done = shell(f"$raydmd {words}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


LIBRARY = """
import logging, os, sys, warnings
from pathlib import Path
from raydmd.console import console, errors, hold_streams, notices_to
hold_streams()
import ray
from raydmd.runtime.ray_compat import driver_prints_to
with notices_to(Path("run.log")) as stream, driver_prints_to(stream):
    os.write(2, b"[native E] raylet\\n")
    logging.getLogger("ray").handlers.clear()  # as ray.init does
    logging.getLogger("ray.train").warning("a logger of Ray")
    logging.getLogger("torch").warning("a logger of torch")
    warnings.warn("a warning")
    ray._private.worker.print_to_stdstream({"lines": ["a node"], "pid": "raylet", "is_err": True}, False)
    console.print("ours")
    errors.print("our error")
os.write(2, b"after\\n")
"""


def test_what_libraries_say_is_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY)
    done = shell("$python library.py", tmp_path)
    assert (done.stdout, done.stderr) == ("ours\n", "our error\nafter\n")
    log = (tmp_path / "run.log").read_text()
    for words in ("[native E] raylet", "a logger of Ray", "a logger of torch", "a warning", "a node"):
        assert words in log, (words, log)
    assert "ours" not in log


LOST = """
import os
from pathlib import Path
from raydmd.console import errors, hold_streams, notices_to
hold_streams()
try:
    with notices_to(Path("run.log")):
        os.write(2, b"a notice\\n")
        raise RuntimeError
except RuntimeError:
    errors.print("our error")
os.write(2, b"a thread of it goes on\\n")
"""


def test_what_native_code_says_after_an_error_is_in_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    done = shell("$python lost.py", tmp_path)
    assert (done.stdout, done.stderr) == ("", "our error\n")
    assert (tmp_path / "run.log").read_text() == "a notice\na thread of it goes on\n"
