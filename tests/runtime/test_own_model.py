"""docs/own-model.md as a reader follows it: every block in order, in an empty folder; and the quick start, shorter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, command
from documents import Block, blocks_of
from ports import free_ports
from worker_forks import PRELOADED

from raydmd.cli import run

SECONDS = 900.0
PORT = "8000"  # of the page


def shell(text: str, here: Path) -> None:
    """Run lines as in a terminal in which raydmd is installed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=here, env=environment(here), capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def environment(here: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{here / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PYTHONPATH": f"{PRELOADED}:{ROOT}", "OMP_NUM_THREADS": "1", "HOME": str(here), "PATH": path}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with what a checkout has for the page."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "raydmd").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m raydmd "$@"\n')
    (tmp_path / "bin" / "raydmd").chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_every_block_of_the_page(here: Path) -> None:
    blocks = list(blocks_of(ROOT / "docs" / "own-model.md"))
    recipes = [block for block in blocks if block.language == "yaml"]
    (here / "my.yaml").write_text(recipes[0].text)
    (server,) = [block for block in blocks if block.note == "serves"]
    (client,) = [block for block in blocks if block.language == "python"]
    for block in blocks:
        assert block.is_run
        if block.language == "bash" and block != server:
            shell(block.text, here)
    assert sorted(path.suffix for path in (here / "pictures").iterdir()) == [".png", ".png"]
    assert "data:image/png;base64," in (here / "runs" / "mine" / "report.html").read_text()
    index = json.loads((here / "exported" / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline"
    assert "pipe(" in (here / "exported" / "README.md").read_text()
    ask(server, client, here)


def ask(server: Block, client: Block, here: Path) -> None:
    """Run the page's server, at a port that is free, and its client."""
    port = str(free_ports(1)[0])
    assert PORT in server.text and PORT in client.text
    program, *words = server.text.replace(PORT, port).split()
    assert program == "raydmd"
    words[1] = str(here / words[1])
    with command(words, here / "serve.log", HOME=str(here)) as served:
        served.until(lambda: f"serving {here}" in served.log.read_text())
        done = subprocess.run(
            [sys.executable, "-c", client.text.replace(PORT, port)], capture_output=True, text=True, timeout=SECONDS,
            env=environment(here),
        )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "2 pictures\n", done.stderr


def test_the_quick_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shorter = [
        "pretrain.iterations=20", "pretrain.max_workers=1", "iterations=2", "method.fake_updates=1", "batch.micro=64",
        "evaluation.samples=50", "teacher.steps=4", "monitor.samples_every=1",
    ]  # fmt: skip
    out = tmp_path / "quick"
    assert run(["quickstart", "--out", str(out), *(word for each in shorter for word in ("--set", each))]) == 0
    said = capsys.readouterr().out
    assert f"look at the pictures: {out / 'report.html'}" in said.replace("\n", "")
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["student"]["fd_teacher"] > 0 and figures["samples"] == 50
    assert len(list((out / "experts").glob("phase-*/model.safetensors"))) == 2
