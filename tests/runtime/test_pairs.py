"""ODE pairs by a job of Ray Data: the local bits, whoever is killed; made once; and runs that train on the folder."""

import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from disturbed import Story, assert_bits_of_the_reference, wait_until
from rich.console import Console
from safetensors.torch import load_file, save_file

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.cli import run as command
from raydmd.config.recipe import Recipe
from raydmd.data.pair_shards import ShardedPairs, missing_shards, read_index, shard_name
from raydmd.data.trajectories import Pairs
from raydmd.errors import RunError, UserError
from raydmd.methods.local import make_pairs, train
from raydmd.methods.registry import build_method
from raydmd.runs.folders import expert_file
from raydmd.runs.run import recipe_family
from raydmd.runtime.cluster import join_or_start
from raydmd.runtime.launch import distill
from raydmd.runtime.pairs import collect_pairs
from raydmd.training.teacher import Scorer

QUIET = Console(quiet=True)
WORKER = "ShardWorker"  # in the class name of Ray Data's actors
SMALL = ["runtime.fake.cpus=0.1", "runtime.generator.cpus=0.1"]
RING = [
    "method.name=dmd", "method.regression.weight=0.5", "method.regression.pairs=300", "teacher.steps=4",
    "runtime.teacher={cpus: 0.5}", *SMALL,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    """A Ray of this machine's own."""
    assert join_or_start(2, 100)
    try:
        yield
    finally:
        ray.shutdown()


def local_pairs(recipe: Recipe, prompts: Any) -> Pairs:
    family, method = recipe_family(recipe), build_method(recipe)
    scorer = Scorer(recipe, family, family.load_teacher())
    return make_pairs(method, family, scorer, prompts(recipe.teacher.family), method.pairs)


def assert_pairs(folder: Path, expected: Pairs) -> None:
    noise, result, conditions = ShardedPairs(folder, len(expected)).take(np.arange(len(expected)))
    assert torch.equal(noise, expected.noise) and torch.equal(result, expected.result)
    assert conditions.keys() == expected.conditions.keys()
    assert all(torch.equal(value, expected.conditions[name]) for name, value in conditions.items())


def job_actors() -> list[dict[str, Any]]:
    return [actor for actor in ray._private.state.actors().values() if WORKER in actor["ActorClassName"]]


def meanwhile(work: Callable[[], None]) -> Callable[[], None]:
    """Do something in a thread; return what waits for it and raises its error."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> None:
        thread.join(60)
        assert not thread.is_alive()
        if errors:
            raise errors[0]

    return join


def test_a_worker_is_killed_and_the_bits_are_the_local_ones(quick: Any, prompts: Any, tmp_path: Path) -> None:
    """Two workers, six shards; then what is lost or has rotted is made again, and nothing else."""
    folder = tmp_path / "pairs"
    recipe = quick(
        "digits", "method.name=dmd", "method.regression.weight=1", "method.regression.pairs=1300", "teacher.steps=80",
        "runtime.teacher={max_workers: 2, cpus: 0.5}",
    )  # fmt: skip
    pids: set[int] = set()

    def kill() -> None:
        def at_work() -> list[dict[str, Any]]:
            return [actor for actor in job_actors() if actor["State"] == "ALIVE" and actor["Pid"]]

        wait_until(lambda: [*folder.glob("*.safetensors")], 60)
        index = read_index(folder)
        assert index is not None and index.shards == 6 and len(missing_shards(folder, index)) >= 3
        pids.update(actor["Pid"] for actor in at_work())
        os.kill(min(pids), signal.SIGKILL)

    join = meanwhile(kill)
    said = io.StringIO()
    assert collect_pairs(recipe, folder, console=Console(file=said, width=200)) == 6
    join()
    assert "shards 1/6, about " in said.getvalue()
    assert pids and sum(int(actor["NumRestarts"]) for actor in job_actors()) >= 1
    expected = local_pairs(recipe, prompts)
    assert_pairs(folder, expected)
    with pytest.raises(AssertionError):
        assert_pairs(folder, Pairs(expected.noise, expected.result + 1e-6, expected.conditions))
    wait_until(lambda: not [actor for actor in job_actors() if actor["State"] == "ALIVE"], 30)

    assert collect_pairs(recipe, folder, console=QUIET) == 0
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    rotten = bytearray((folder / shard_name(4)).read_bytes())
    rotten[-1] ^= 1
    (folder / shard_name(4)).write_bytes(rotten)
    (folder / shard_name(2)).write_bytes(b"half")
    assert collect_pairs(recipe, folder, console=QUIET) == 2
    assert_pairs(folder, expected)
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert {name for name in now if now[name] != kept[name]} == {shard_name(2), shard_name(4)}
    with pytest.raises(UserError, match="teacher.guidance_scale: 1.5 there, 2 here"):
        teacher = recipe.teacher.model_copy(update={"guidance_scale": 2.0})
        collect_pairs(recipe.model_copy(update={"teacher": teacher}), folder, console=QUIET)


def assert_experts(folder: Path, recipe: Recipe, prompts: Any) -> None:
    """Hold a run's experts against the reference's, which has its teacher make the pairs."""
    assert recipe.pairs.path is None
    family = recipe_family(recipe)
    experts = train(recipe, family, family.load_teacher(), prompts(recipe.teacher.family)).experts
    for index, expected in enumerate(experts):
        found = load_file(expert_file(folder, index))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def ring_pairs(quick: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of `RING` in shards of two chunks."""
    folder = tmp_path_factory.mktemp("ring") / "pairs"
    assert collect_pairs(quick("ring", *RING), folder, shard_size=512, console=QUIET) == 1
    assert_pairs(folder, local_pairs(quick("ring", *RING), prompts))
    return folder


def test_a_run_takes_a_folders_pairs(ring_pairs: Path, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """From where one without a folder had come to; the bits are those of a run that makes its own pairs."""
    own, folder = quick("ring", *RING), quick("ring", *RING, f"pairs.path={ring_pairs}")
    assert distill(own, tmp_path / "run", console=QUIET, until=2) is False
    assert distill(folder, tmp_path / "run", console=QUIET) is True
    assert_experts(tmp_path / "run", own, prompts)

    shutil.copytree(ring_pairs, tmp_path / "pairs")
    (tmp_path / "pairs" / shard_name(0)).unlink()
    with pytest.raises(UserError, match=r"pairs.path: .* has 0 of 1 shards; `raydmd pairs RECIPE --count 300 --out"):
        distill(quick("ring", *RING, f"pairs.path={tmp_path / 'pairs'}"), tmp_path / "refused", console=QUIET)
    assert not (tmp_path / "refused").exists()


def test_a_newcomer_to_the_students_reads_the_folder_itself(
    ring_pairs: Path, quick: Any, prompts: Any, tmp_path: Path
) -> None:
    def plot(story: Story) -> None:
        story.complete()
        story.kill("generator")
        story.lost_and_recovered(1)
        story.complete()

    more = [*RING, "iterations=100000", "checkpoint.every=10", "runtime.generator={max_workers: 2, cpus: 0.1}"]
    story = Story(quick("ring", *more, f"pairs.path={ring_pairs}"), tmp_path / "run", plot, limit_s=60).run()
    assert [event["steps_lost"] for event in story.events("recovered")] == [0]
    story.recipe = quick("ring", *more)  # whose teacher makes the pairs
    assert_bits_of_the_reference(story, prompts)


def test_what_ends_a_job_is_said_in_one_line(
    quick: Any, teachers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    teacher = load_file(teachers["ring"] / "model.safetensors")
    shutil.copytree(teachers["ring"], tmp_path / "broken")
    save_file({name: value * float("nan") for name, value in teacher.items()}, tmp_path / "broken/model.safetensors")
    recipe = quick("ring", *RING, "method.regression.pairs=256", f"teacher.path={tmp_path / 'broken'}")
    with pytest.raises(RunError, match=r"^256 of the teacher's ODE pairs 0 to 255 are not finite: [^\n]*$"):
        collect_pairs(recipe, tmp_path / "pairs", console=QUIET)
    wait_until(lambda: not [actor for actor in job_actors() if actor["State"] == "ALIVE"], 30)
    unplaced = quick("ring", *RING, "runtime.teacher={gpus: 3}", "runtime.placement_timeout=1")
    with pytest.raises(UserError, match=r"^runtime.teacher: not placed within 1 s: 1 CPU, 3 GPU; free in the cluster"):
        collect_pairs(unplaced, tmp_path / "unplaced", console=QUIET)

    words = ["--set", f"teacher.path={teachers['ring']}", "--set", "teacher.steps=2", "--out", str(tmp_path / "cli")]
    assert command(["pairs", "ring", "--count", "20", *words]) == 0
    assert "1 shards made; use it with --set pairs.path=" in capsys.readouterr().out.replace("\n", " ")
    assert command(["pairs", "ring", "--count", "20", *words]) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert command(["pairs", "ring", "--count", "30", *words]) == 2
    assert "total: 20 there, 30 here" in capsys.readouterr().err
    assert command(["pairs", "ring", "--count", "20", "--shard-size", "300", *words]) == 2
    assert "take 512" in capsys.readouterr().err
