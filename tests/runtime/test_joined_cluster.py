"""A cluster that was there before the command, found as `auto`, joined, and lost."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import command
from ports import free_ports
from worker_forks import SOCKET

from raydmd.jsonl import read_lines

ALONE = ["unshare", "--pid", "--fork", "--mount-proc"]  # Ray looks for clusters among the processes that it sees


@pytest.fixture(autouse=True)
def alone() -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("processes cannot be hidden from one another here")


def distill(teachers: dict[str, Path], folder: Path) -> list[str]:
    settings = [f"teacher.path={teachers['ring']}", "batch.size=16", "batch.micro=4", "iterations=4000"]
    return ["distill", "ring", *(word for item in settings for word in ("--set", item)), "--out", str(folder)]


def test_auto_where_there_is_none(teachers: dict[str, Path], tmp_path: Path) -> None:
    arguments = distill(teachers, tmp_path / "run")
    with command(arguments, tmp_path / "log", prefix=ALONE, RAY_ADDRESS="auto", RAY_TMPDIR=str(tmp_path)) as run:
        code, output = run.ended(60)
    assert code == 2 and output.startswith("raydmd: RAY_ADDRESS auto: ") and output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_cluster_is_found_joined_and_lost(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Its control store is killed amid the run: an error that names it within 15 s, and the rest of it is let be."""
    folder, (port,) = tmp_path / "run", free_ports(1)
    head = (
        f"{sys.executable} -m ray.scripts.scripts start --head "
        f"--node-ip-address 127.0.0.1 --port {port} --num-cpus 4 --include-dashboard false "
        '--object-store-memory 80000000 --disable-usage-stats >/dev/null; "$@"; exit $?'
    )
    variables = {"RAY_ADDRESS": "auto", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    variables[SOCKET] = ""  # a process that was forked elsewhere is none of those that this one sees
    prefix = [*ALONE, "bash", "-c", head, "bash"]
    with command(distill(teachers, folder), tmp_path / "log", prefix=prefix, **variables) as run:
        run.until(lambda: len(read_lines(folder / "metrics.jsonl")) >= 3)
        assert len(run.named("raylet")) == len(run.named("gcs_server")) == 1  # no Ray of its own
        before = run.log.read_text()
        run.named("gcs_server")[0].kill()
        began = time.monotonic()
        code, output = run.ended(60)
        assert code == 1 and time.monotonic() - began < 20, output  # bash and its cluster end with it
        last = output.removeprefix(before).splitlines()[-1]
        assert last.startswith("raydmd: Ray's ") and "was lost; the same command goes on" in last
        assert "Traceback" not in output and "[2" not in output
