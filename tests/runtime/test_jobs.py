"""`ray job submit` to a cluster with token authentication: the teacher is trained and distilled there."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import train_teacher
from ports import free_ports
from safetensors.torch import load_file

from raydmd.jsonl import read_lines
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "a-token-of-this-test-alone-0123456789"
RECIPE = [
    "teacher.options={width: 32, depth: 2}", "pretrain.iterations=40", "pretrain.batch=64", "pretrain.micro=16",
    "iterations=4", "batch.size=16", "batch.micro=4", "method.fake_updates=2", "monitor.samples_every=0",
    "monitor.tensorboard=false",
]  # fmt: skip


@dataclass
class Head:
    address: str
    folder: Path

    def submit(self, *entrypoint: str, token: bool = True, wait: bool = True) -> subprocess.CompletedProcess:
        command = [str(BIN / "ray"), "job", "submit", "--address", self.address, "--working-dir", str(ROOT)]
        environment = clean() | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} if token else {})
        return subprocess.run(
            [*command, *([] if wait else ["--no-wait"]), "--", *entrypoint],
            capture_output=True, text=True, env=environment, cwd=self.folder, timeout=600,
        )  # fmt: skip


def clean() -> dict[str, str]:
    """The environment without what this process's own Ray has put there, and with this Python first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    return {**kept, "PATH": f"{BIN}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head of its own: own ports, own folder, and ended by its own process ids."""
    gcs, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="rmd-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "head.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=5",
                    "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}",
                    "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                    f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}/ray",
                    f"--object-store-memory={200 * 2**20}",
                ],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=clean() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
            )  # fmt: skip
        family = [psutil.Process(process.pid)]
        try:
            end = time.monotonic() + 300
            while not listening(dashboard):
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield Head(f"http://127.0.0.1:{dashboard}", Path(folder))
        finally:
            if family[0].is_running():
                family += family[0].children(recursive=True)
            for member in family:
                if member.is_running():
                    member.kill()
            process.wait(120)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_without_the_token_nothing_is_taken(head: Head, tmp_path: Path) -> None:
    done = head.submit("python", "jobs/distill.py", "ring", "--out", str(tmp_path / "run"), token=False)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    said = (done.stdout + done.stderr).lower()
    assert "401" in said or "unauthorized" in said or "authentication" in said, said


def test_a_job_trains_its_teacher_and_distils_it(head: Head, tmp_path: Path, prompts: Any) -> None:
    """Ray Train and the runtime inside a job: the bits of training and distilling in this process."""
    settings = [word for item in RECIPE for word in ("--set", item)]
    done = head.submit("python", "jobs/distill.py", "ring", *settings, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = load_recipe("ring", RECIPE)
    here = load_file(train_teacher(recipe, tmp_path / "teacher") / "model.safetensors")
    there = load_file(tmp_path / "run/teacher/model.safetensors")
    assert here.keys() == there.keys()
    assert max(float((here[name] - there[name]).abs().max()) for name in here) == 0.0
    run = Run(tmp_path / "run")
    expected = train(run.recipe, recipe_family(run.recipe), run.teacher(), prompts("ring")).experts
    for index, weights in enumerate(expected):
        found = load_file(expert_file(run.folder, index))
        assert max(float((found[name] - weights[name]).abs().max()) for name in weights) == 0.0
    assert [line["iteration"] for line in run.metrics()] == [0, 1, 2, 3]
    assert run.events()[-1]["event"] == "finished"
    progress = read_lines(run.folder / "teacher/pretrain.jsonl")
    assert progress[-1]["iteration"] == 40 and progress[-1]["workers"] in (1, 2)


def test_a_mistake_in_a_job_ends_it_with_one_line(head: Head, tmp_path: Path) -> None:
    done = head.submit("python", "jobs/distill.py", "ring", "--set", "method.phazes=2", "--out", str(tmp_path / "run"))
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    said = done.stdout + done.stderr
    assert "did you mean 'phases'?" in said and "exit code 2" in said
