"""`raydmd generate` for many prompts and for videos, what tells how far a command is, and who may read its files."""

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from disturbed import wait_until
from pyarrow import parquet
from rich.console import Console
from run_folders import make_run
from test_videos import FRAMES, SIDE, make_video_run

from raydmd import cli
from raydmd.errors import UserError
from raydmd.evaluation.classifier import load_classifier
from raydmd.evaluation.prompts import read_prompt_file
from raydmd.methods.loading import load_recipe
from raydmd.models.base import save_teacher
from raydmd.progress import counting, time_left
from raydmd.runs.run import recipe_family
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.pretrain import shown_progress
from raydmd.runtime.workers.base import CallStats

TEXTS = ["a fox", "two, or more", "a fox"]


def test_a_file_of_prompts_is_read_by_its_ending(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n\n two, or more\na fox\n")
    (tmp_path / "a.csv").write_text('\ufeffcaption,n\na fox,1\n"two, or more",2\na fox,3\n')  # as Excel has it
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in (TEXTS[0], {"text": TEXTS[1]}, TEXTS[2])))
    parquet.write_table(pa.table({"other": [1, 2, 3], "prompt": TEXTS}), tmp_path / "a.parquet")
    for ending in ("txt", "csv", "jsonl", "parquet"):
        assert read_prompt_file(tmp_path / f"a.{ending}") == TEXTS, ending


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\n \n", "no prompt in it"),
        ("a.txt", b"\xff\xfe", "decode"),
        ("a.csv", b"n,m\n1,2\n", "the header has no prompt, text, caption"),
        ("a.jsonl", b'"a fox"\n{"n": 1}\n', "row 2 has no prompt, text, caption"),
        ("a.jsonl", b"a fox\n", "Expecting value"),
        ("a.parquet", b"a fox\n", "Parquet"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompt_file(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"--prompts {tmp_path / name}: ") and words in message and "\n" not in message


@pytest.fixture(scope="module")
def digits(quick: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(quick("digits"), tmp_path_factory.mktemp("runs") / "digits", prompts("digits")).folder


def test_many_prompts_have_each_its_files(digits: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.txt").write_text("7\n1\n7\n")
    code = cli.run(["generate", str(digits), "--prompts", f"{tmp_path}/p.txt", "-n", "2", "--out", f"{tmp_path}/out"])
    said = capsys.readouterr()
    assert code == 0
    names = [Path(line).name for line in said.out.splitlines()]
    assert names == [f"{row:04d}-{digit}-0-{i}.png" for row, digit in ((1, 7), (2, 1), (3, 7)) for i in (0, 1)]
    assert said.err.splitlines()[0].startswith("making 1/6, about 0:0")
    assert cli.run(["generate", str(digits), "--prompt", "7", "--out", f"{tmp_path}/one"]) == 0
    assert (tmp_path / "one/7-0-0.png").read_bytes() == (tmp_path / "out/0003-7-0-0.png").read_bytes()
    (tmp_path / "p.txt").write_text("7\nseven\n")
    assert cli.run(["generate", str(digits), "--prompts", f"{tmp_path}/p.txt", "--out", f"{tmp_path}/none"]) == 2
    assert not (tmp_path / "none").exists()  # told before the first is made


def test_a_video_model_makes_videos(tmp_path: Path, capsys: Any) -> None:
    run = make_video_run(tmp_path)
    command = ["generate", str(run), "--prompt", "1", "--seed", "3", "--fps", "8", "--out"]
    assert cli.run([*command, f"{tmp_path}/one"]) == 0
    assert cli.run([*command, f"{tmp_path}/two", "-n", "2"]) == 0
    first, second = (tmp_path / f"two/1-3-{i}.mp4" for i in (0, 1))
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/one/1-3-0.mp4", str(first), str(second)]
    assert first.read_bytes() == (tmp_path / "one/1-3-0.mp4").read_bytes() != second.read_bytes()
    with av.open(str(first)) as video:
        assert video.streams.video[0].average_rate == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == FRAMES and {frame.shape for frame in frames} == {(SIDE, SIDE, 3)}
    assert len(np.unique(frames[0])) > 4


def test_the_time_left_is_that_of_the_last_ones() -> None:
    assert time_left(100, [1.0, 3.0]) == "about 0:03:20 left"
    assert time_left(3, []) == "about 0:00:00 left"
    told = io.StringIO()
    with counting("making", 40, Console(file=told, width=99)) as one:
        for _ in range(40):
            one()
    lines = told.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"making {done}/40" for done in range(4, 40, 4)]


def test_a_jobs_log_has_the_time_left(quick: Any, tmp_path: Path) -> None:
    told = io.StringIO()
    recorder = Recorder(tmp_path, quick("ring"), 40, Console(file=told, width=200))
    recorder.rewind(0)
    recorder.begin()
    for n in range(8):
        call_stats = [CallStats(role, 0, 0.1) for role in ("teacher", "fake", "generator")]
        recorder.iteration(0, n, call_stats, {"teacher": 1, "fake": 1, "generator": 1})
    recorder.close()
    lines = told.getvalue().splitlines()
    assert ["4/40" in lines[0], "8/40" in lines[1], len(lines)] == [True, True, 2]
    assert all(" s an iteration, about 0:00:" in line and line.endswith(" left") for line in lines)


def test_a_teachers_training_says_the_time_left_too(tmp_path: Path) -> None:
    """In a job's log, a line each fifth of the way."""
    told, file = io.StringIO(), tmp_path / "pretrain.jsonl"

    def has(words: str) -> bool:
        return words in told.getvalue()

    with shown_progress(Console(file=told, width=200), file, 100), file.open("w", buffering=1) as lines:
        for iteration in range(10, 50, 10):
            lines.write(json.dumps({"iteration": iteration, "loss": 0.5, "workers": 2}) + "\n")
            if iteration in (20, 40):
                wait_until(lambda iteration=iteration: has(f"teacher  {iteration}/100"), 20)
    lines_told = told.getvalue().splitlines()
    assert [line.split()[1] for line in lines_told] == ["20/100", "40/100"]
    assert all(re.search(r"loss 0\.500  workers 2, .*about \d+:\d\d:\d\d left$", line) for line in lines_told), (
        lines_told
    )


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_files_are_as_the_umask_lets_them_be(usual_umask: None, digits: Path, tmp_path: Path) -> None:
    """Weights, the classifier, pictures: nothing is for its owner alone."""
    recipe = load_recipe("ring")
    family = recipe_family(recipe)
    save_teacher(family.new_network(), tmp_path / "teacher", "ring", family.options)
    load_classifier(tmp_path / "cache")
    assert cli.run(["generate", str(digits), "--prompt", "7", "--out", str(tmp_path / "pictures")]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4 and any(path.suffix == ".safetensors" for path in files)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o640"}
