"""A run that is killed, interrupted and damaged goes on from its last whole manifest, to the same bits.

One run's story is told by real processes (`story`); the tests look at what was seen on the way.
"""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Command
from safetensors.torch import load_file

from raydmd.cli import run as command
from raydmd.jsonl import read_lines
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.runs.folders import expert_file
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.manager import Archive

ITERATIONS = 60
RECIPE = [
    f"iterations={ITERATIONS}", "batch.size=16", "batch.micro=4", "method.fake_updates=3", "checkpoint.every=4",
    "monitor.samples_every=0", "monitor.tensorboard=false",
]  # fmt: skip


@dataclass
class Story:
    """What was seen: of each start its exit code, its output, the iteration it went on from; and more by name."""

    folder: Path
    arguments: list[str]
    codes: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)


def outlived(processes: list[psutil.Process]) -> list[str]:
    """Wait for processes to end by themselves; return the names of those that do not.

    Ray's two agents of a node end a minute after a raylet that was killed: they report its death to nobody first.
    """
    agents = [process for process in processes if title(process).strip().endswith("Agent")]
    _, alive = psutil.wait_procs([process for process in processes if process not in agents], timeout=180)
    names = [title(process) for process in alive]
    for process in (*alive, *agents):
        if process.is_running():
            process.kill()
    return names


def listeners(processes: list[psutil.Process]) -> list[tuple[str, str, int]]:
    found = []
    for process in processes:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            pass
    return found


def half_written(checkpoints: Path) -> bool:
    """Whether a checkpoint is being written: a folder of shards without its manifest, or a part of a file."""
    try:
        names = set(os.listdir(checkpoints))
    except FileNotFoundError:
        return False
    return any("." not in name and f"{name}.json" not in names for name in names) or any(
        name.endswith(".part") for name in names
    )


def damage_newest(checkpoints: Path) -> tuple[int, int]:
    """Spoil the newest manifest's state; return its iteration, and that of the one before."""
    newest = Archive(str(checkpoints)).newest().manifest
    assert newest is not None
    if "fake" in newest.files:
        shard = checkpoints / newest.files["fake"]["path"]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 0x10
        shard.write_bytes(content)
    else:
        (checkpoints / f"step-{newest.iteration:06d}.json").write_text("{")
    found = Archive(str(checkpoints)).newest().manifest
    assert found is not None
    return newest.iteration, found.iteration


@pytest.fixture(scope="module")
def story(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("resume")
    folder = root / "run"
    recipe = [f"teacher.path={teachers['ring']}", *RECIPE]
    arguments = ["distill", "ring", *(word for item in recipe for word in ("--set", item)), "--out", str(folder)]
    told = Story(folder, arguments)
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    started: list[Command] = []

    def start(*more: str) -> Command:
        started.append(Command([*arguments, *more], root / f"{len(started)}.log"))
        return started[-1]

    def ended(process: Command) -> None:
        code, output = process.ended()
        told.codes.append(code)
        told.outputs.append(output)

    def lines() -> int:
        return len(read_lines(metrics))

    try:
        # Ctrl-C while Ray is still starting
        first = start()
        first.until((folder / "recipe.yaml").exists)
        family = first.until(lambda: len(first.family()) > 1 and first.family())
        os.killpg(first.pid, signal.SIGINT)
        ended(first)
        told.seen["outlived Ctrl-C"] = outlived(family)

        # the driver dies after some iterations
        second = start()
        second.until(lambda: lines() >= 1)
        family = second.family()
        told.seen["workers"] = [name for process in family if (name := title(process)).startswith("ray::")]
        second.until(lambda: lines() >= 10)
        family = second.family()
        os.kill(second.pid, signal.SIGSTOP)  # it says nothing, but it is there
        told.seen["rival"] = start().ended()
        os.kill(second.pid, signal.SIGKILL)
        ended(second)
        told.seen["outlived the driver"] = outlived(family)
        told.seen["lines at the first kill"] = lines()

        # the whole machine dies, if it can be caught in the middle of writing a checkpoint
        third = start("--resume", "auto")
        before = lines()
        third.until(lambda: lines() >= 1 and any(e.get("resumed") for e in read_lines(folder / "events.jsonl")))
        family = sorted(third.family(), key=lambda process: "CheckpointWriter" not in title(process))
        last = ITERATIONS // 2 - 3  # before the first phase's edge
        third.until(lambda: half_written(checkpoints) or lines() >= last, pause=0.0)
        told.seen["caught in the middle"] = half_written(checkpoints)
        for process in family:
            process.kill()
        ended(third)
        outlived(family)
        told.seen["lines at the second kill"] = (before, lines())

        # the newest checkpoint is damaged; more workers than before; Ctrl-C
        told.seen["damaged"], told.seen["whole"] = damage_newest(checkpoints)
        events = folder / "events.jsonl"
        for path in (metrics, events):
            path.write_bytes(b"\xff\x00{\n" + path.read_bytes() + b'{"iteration": 5, "ev')
        said = len(read_lines(events))
        fourth = start("--set", "runtime.fake.max_workers=2", "--set", "runtime.generator.max_workers=2")
        fourth.until(lambda: any("resumed" in event for event in read_lines(events)[said:]))
        told.seen["listening"] = listeners(fourth.family())
        fourth.until(lambda: lines() >= ITERATIONS // 2 + 5)
        family = fourth.family()
        os.killpg(fourth.pid, signal.SIGINT)
        ended(fourth)
        told.seen["outlived the second Ctrl-C"] = outlived(family)
        told.seen["lines at Ctrl-C"] = lines()
        found = Archive(str(checkpoints)).newest().manifest
        assert found is not None
        told.seen["manifest at Ctrl-C"] = found.iteration

        ended(start())  # and to the end
        yield told
    finally:
        for process in started:
            for member in process.family():
                member.kill()


def title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.NoSuchProcess:
        return ""


def test_it_ends_with_the_bits_of_a_run_that_nothing_happened_to(story: Story, prompts: Any) -> None:
    assert story.codes == [130, -signal.SIGKILL, -signal.SIGKILL, 130, 0], story.outputs
    recipe = load_recipe(str(story.folder / "recipe.yaml"))
    family = recipe_family(recipe)
    expected = train(recipe, family, family.load_teacher(), prompts("ring")).experts
    for index, weights in enumerate(expected):
        found = load_file(expert_file(story.folder, index))
        assert found.keys() == weights.keys()
        assert max(float((found[name] - weights[name]).abs().max()) for name in weights) == 0.0
    assert not all(torch.equal(expected[0][name], expected[1][name]) for name in expected[0])


def test_a_second_driver_on_the_folder_is_refused_and_the_first_goes_on(story: Story) -> None:
    code, output = story.seen["rival"]
    assert code == 2 and output.count("\n") == 1, output
    assert output.startswith(f"raydmd: --out {story.folder}: another driver is at work on it (process ")
    assert not (story.folder / "run.lock").exists()


def test_broken_lines_are_removed_and_said(story: Story) -> None:
    for name in ("metrics", "events"):
        assert f"{story.folder}/{name}.jsonl: 2 broken line(s) were removed" in story.outputs[3]
        for line in (story.folder / f"{name}.jsonl").read_text().splitlines():
            assert isinstance(json.loads(line), dict)


def test_its_metrics_have_every_iteration_once(story: Story) -> None:
    lines = read_lines(story.folder / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS))
    assert [line["generator_version"] for line in lines] == list(range(1, ITERATIONS + 1))
    assert [line["fake_version"] for line in lines] == [3 * n for n in range(1, ITERATIONS + 1)]
    assert (story.folder / "metrics.jsonl").read_text().count("\n") == ITERATIONS


def test_it_went_on_from_manifests(story: Story) -> None:
    events = read_lines(story.folder / "events.jsonl")
    resumed = [event["resumed"] for event in events if "resumed" in event]
    assert len(resumed) == 3  # the second may be behind the first: the newest manifest was damaged in between
    assert resumed[0] % 4 == 0 and 4 <= resumed[0] <= story.seen["lines at the first kill"]
    assert resumed[0] >= story.seen["lines at the first kill"] - 4 - 2  # at most one interval was lost
    assert resumed[1] == story.seen["whole"] < story.seen["damaged"]
    assert resumed[2] == story.seen["manifest at Ctrl-C"]
    assert [event["event"] for event in events if event["event"] in ("stopped", "finished")] == ["stopped", "finished"]
    assert events[-1]["iteration"] == ITERATIONS
    print("caught in the middle of a checkpoint:", story.seen["caught in the middle"])


def test_a_damaged_checkpoint_is_said_to_be_skipped(story: Story) -> None:
    damaged = f"step-{story.seen['damaged']:06d}.json"
    assert [damaged in output and "skipped" in output for output in story.outputs] == [False] * 3 + [True, False]


def test_ctrl_c_stops_at_an_iterations_end_with_a_manifest(story: Story) -> None:
    assert story.seen["manifest at Ctrl-C"] == story.seen["lines at Ctrl-C"] >= ITERATIONS // 2 + 5
    assert "stopping at the iteration's end" in story.outputs[3] and "the same command goes on" in story.outputs[3]
    for output in (story.outputs[0], story.outputs[3]):
        assert "Traceback" not in output
    assert "interrupted" in story.outputs[0]


def test_nothing_outlives_its_driver(story: Story) -> None:
    assert len([name for name in story.seen["workers"] if "Worker" in name]) == 3
    for what in ("outlived Ctrl-C", "outlived the driver", "outlived the second Ctrl-C"):
        assert story.seen[what] == [], what


def test_everything_listens_on_loopback_only(story: Story) -> None:
    listening = story.seen["listening"]
    assert len(listening) >= 8  # Ray's control store, raylet and workers, and the trainer groups' stores
    assert [each for each in listening if not ip_address(each[1].removeprefix("::ffff:")).is_loopback] == []


def state_of(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_finished_run_says_so(story: Story, capsys: Any) -> None:
    before = state_of(story.folder)
    without_out = story.arguments[: story.arguments.index("--out")]
    for arguments in (story.arguments, [*without_out, "--resume", str(story.folder)]):
        assert command(arguments) == 0
        out, err = capsys.readouterr()
        assert "finished" in out and "nothing to do" in out and err == ""
    assert state_of(story.folder) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--resume", "never"], ["already holds a run", "--resume auto"]),
        (["--set", "optimizer.fake.lr=0.5"], ["another recipe", "optimizer.fake.lr", "0.001 there, 0.5 here"]),
        (["--set", "seed=7"], ["another recipe", "seed: 0 there, 7 here"]),
        (["--set", "method.name=dmd-sgts"], ["method.name", "phased there, dmd-sgts here"]),
        (["--set", "batch.micro=8"], ["batch.micro"]),
        (["--resume", "elsewhere"], ["--resume elsewhere", "auto"]),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(story: Story, capsys: Any, more: list[str], words: list[str]) -> None:
    before = state_of(story.folder)
    assert command([*story.arguments, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), err
    assert state_of(story.folder) == before


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, teachers: Any, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert command(["distill", "ring", "--set", f"teacher.path={teachers['ring']}", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
