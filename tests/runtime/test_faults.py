"""A worker's own fault ends the run after some tries, with the error; the cluster's fault does not."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import held
import pytest
import ray
import torch
from disturbed import Story, assert_bits_of_the_reference, head_alone
from rich.console import Console

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.errors import RunError
from raydmd.jsonl import read_lines
from raydmd.methods.program import trace_method
from raydmd.models.experts import Experts
from raydmd.runtime.actors import RunActors
from raydmd.runtime.launch import distill
from raydmd.runtime.membership.role_workers import RoleWorkers
from raydmd.runtime.observability.recorder import Recorder
from raydmd.runtime.recovery.faults import cause_of, own_fault
from raydmd.runtime.recovery.manager import RecoveryManager
from raydmd.runtime.workers.base import StudentWorker, TrainerProgress, TrainerWorker, make_part
from raydmd.runtime.workers.process_group import Rendezvous, StepDropped
from raydmd.runtime.workers.teacher_pool import ScorerPool
from raydmd.runtime.workers.trainer_group import TrainerGroup
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.teacher import Scorer
from raydmd.training.trainable_state import FlatParameters


@pytest.fixture(scope="module")
def here():
    for module in (sys.modules[__name__], held):
        ray.cloudpickle.register_pickle_by_value(module)  # the workers do not have these files
    with head_alone(4):
        yield


class Faulty:
    """A role's part that misbehaves at one method from its n-th call on, counted over all workers in a file."""

    def __init__(self, part: Any, method: str, at: int, what: str, folder: str, times: int) -> None:
        self.part, self.method, self.at, self.what, self.times = part, method, at, what, times
        self.file = Path(folder) / "calls"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "what" in self.__dict__ and name in vars(self.part):
            setattr(self.part, name, value)
        else:
            object.__setattr__(self, name, value)

    def call(self, *arguments: Any, **named: Any) -> Any:
        with self.file.open("ab", buffering=0) as file:
            file.write(b".")
            calls = file.tell()  # behind this call's own byte: no two calls have the same number
        if self.at <= calls < self.at + self.times:
            if self.what == "memory":
                raise MemoryError("tried to allocate 80 GiB")
            if self.what == "exit":
                os._exit(1)
            raise KeyError("no such layer: blocks.7")
        return getattr(self.part, self.method)(*arguments, **named)


def make_faulty(
    kind: type, method: str, at: int, what: str, folder: str, times: int, recipe: Any, device: str
) -> Faulty:
    faulty = Faulty(make_part(kind, recipe, device), method, at, what, folder, times)
    object.__setattr__(faulty, method, faulty.call)
    return faulty


def start_the_first(folder: str, recipe: Any, device: str) -> Any:
    """Start one, after it others only when there is the file well."""
    part = make_part(Scorer, recipe, device)
    try:
        (Path(folder) / "first").touch(exist_ok=False)
    except FileExistsError:
        while not (Path(folder) / "up").exists():
            time.sleep(0.01)
        if not (Path(folder) / "well").exists():
            raise RuntimeError("cannot load weights: no such device") from None
    (Path(folder) / "up").touch()
    return part


def fail_to_start(recipe: Any, device: str) -> Any:
    raise RuntimeError("cannot load weights: shape mismatch")


@pytest.mark.parametrize(
    ("role", "kind", "method", "what", "words"),
    [
        ("generator", Generator, "propose", "memory", "tried to allocate 80 GiB"),
        ("teacher", Scorer, "score", "error", "no such layer: blocks.7"),
    ],
)
def test_an_error_that_comes_again_ends_the_run_with_it(
    here: None, quick: Any, tmp_path: Path, role: str, kind: type, method: str, what: str, words: str
) -> None:
    recipe = quick("ring", "iterations=[6, 6]", "runtime.fake.max_workers=2")
    parts = {role: partial(make_faulty, kind, method, 12, what, str(tmp_path), 10**6)}
    with pytest.raises(RunError) as caught:
        distill(recipe, tmp_path / "run", console=Console(quiet=True), parts=parts)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert words in (tmp_path / "run/error.txt").read_text()
    calls = len((tmp_path / "calls").read_text())
    assert 12 + 2 <= calls <= 12 + 3 * 8  # as often as it may be tried: not once, and not for ever
    events = read_lines(tmp_path / "run/events.jsonl")
    if role != "teacher":
        assert [event["tries"] for event in events if event["event"] == "failed"] == [1, 2, 3]
    assert read_lines(tmp_path / "run/metrics.jsonl")  # steps before it were made


def test_an_error_that_passes_is_borne(here: None, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """Twice in a row, then never again: the steps are made anew, with the same bits."""
    recipe = quick("ring", "iterations=[6, 100000]", "runtime.fake.max_workers=2")
    parts = {"fake": partial(make_faulty, Fake, "update", 14, "error", str(tmp_path), 2)}
    story = Story(recipe, tmp_path / "run", lambda story: story.go_on(15), parts=parts).run()
    assert [event["tries"] for event in story.events("failed")] in ([1], [1, 2])
    assert all(event["steps_lost"] == 0 for event in story.events("recovered"))
    assert_bits_of_the_reference(story, prompts)


@pytest.mark.parametrize(
    ("role", "kind", "method", "words", "losses"),
    [
        ("generator", Generator, "propose", "lost 4 times without a step between, the last time generator 2", 3),
        ("teacher", Scorer, "score", "lost 4 times at one micro-batch, the last time teacher 3", 4),
    ],
)
def test_a_worker_that_always_dies_ends_the_run(
    here: None, quick: Any, tmp_path: Path, role: str, kind: type, method: str, words: str, losses: int
) -> None:
    recipe = quick("ring", "iterations=[6, 6]", "runtime.max_failures=1")
    parts = {role: partial(make_faulty, kind, method, 3, "exit", str(tmp_path), 12)}
    with pytest.raises(RunError, match=f"{words}: its process was"):
        distill(recipe, tmp_path / "run", console=Console(quiet=True), parts=parts)
    lost = [e for e in read_lines(tmp_path / "run/events.jsonl") if e["event"] == "worker-lost"]
    assert len(lost) == losses and all(event["role"] == role for event in lost)


def test_a_lost_scorer_is_made_up_for_when_something_is_scored_without_it(
    here: None, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one dies when it has scored an iteration whose fake updates go on: that commit shows nothing."""
    scored, map_ = [], ScorerPool.map

    async def counted(pool: ScorerPool, *arguments: Any) -> Any:
        call = await map_(pool, *arguments)
        scored.append(call)
        return call

    monkeypatch.setattr(ScorerPool, "map", counted)

    def plot(story: Story) -> None:
        story.go_on(8)
        (tmp_path / "hold-update").touch()
        story.until(lambda: (tmp_path / "held-update").exists())
        iteration = int((tmp_path / "held-update").read_text()) // recipe.method.fake_updates
        story.until(lambda: len(scored) == iteration + 1)
        story.kill("teacher")
        story.until(lambda: story.events("worker-lost", iteration=iteration))
        (tmp_path / "hold-update").unlink()
        (recovered,) = story.lost_and_recovered(1)
        assert (recovered["iteration"], recovered["how"]) == (iteration + 1, "rescheduled")

    recipe = quick("ring", "iterations=[6, 100000]")
    Story(recipe, tmp_path / "run", plot, parts={"fake": held.held(Fake, "update", tmp_path)}).run()


@pytest.mark.parametrize("made", [0, 8])
def test_a_worker_that_dies_while_all_take_the_manifests_state(
    here: None, quick: Any, prompts: Any, tmp_path: Path, made: int
) -> None:
    """The others have that state by then, but the driver has not: its phase, its experts and its records."""
    recipe = quick("ring", "iterations=[6, 6]", "runtime.fake={min_workers: 2, max_workers: 2}")
    quiet = Console(quiet=True)
    story = Story(recipe, tmp_path / "run", lambda story: None)
    if made:
        assert distill(recipe, story.folder, console=quiet, until=made) is False
    parts = {"fake": partial(make_faulty, Fake, "start_phase", 2, "exit", str(tmp_path), 1)}
    assert distill(recipe, story.folder, console=quiet, parts=parts, until=10) is False
    (lost,) = story.events("worker-lost")
    assert lost["role"] == "fake" and lost["iteration"] == made
    assert_bits_of_the_reference(story, prompts)


def test_a_worker_that_cannot_start_ends_the_run(here: None, quick: Any, tmp_path: Path) -> None:
    recipe = quick("ring", "runtime.max_failures=2")
    with pytest.raises(RunError, match="cannot load weights: shape mismatch"):
        distill(recipe, tmp_path / "run", console=Console(quiet=True), parts={"teacher": fail_to_start})


def test_a_run_goes_on_without_a_worker_that_cannot_start_and_takes_it_in_once_it_can(
    here: None, quick: Any, tmp_path: Path
) -> None:
    def plot(story: Story) -> None:
        story.until(lambda: story.events("start-failed", role="teacher"))
        assert story.events("start-failed")[0]["why"] == "RuntimeError: cannot load weights: no such device"
        story.go_on(2)
        (tmp_path / "well").touch()
        story.complete()

    recipe = quick("ring", "iterations=[6, 100000]", "runtime.teacher.max_workers=2")
    parts = {"teacher": partial(start_the_first, str(tmp_path))}
    assert Story(recipe, tmp_path / "run", plot, parts=parts).run().finished is False


def test_steps_that_are_given_up_without_a_loss_end_the_run_with_why(quick: Any, tmp_path: Path) -> None:
    recipe = quick("ring", "runtime.max_failures=1")
    trace = trace_method(recipe)
    groups = {role: TrainerGroup(role, [], Rendezvous("127.0.0.1")) for role in ("generator", "fake")}
    role_workers = {role: RoleWorkers(role, recipe) for role in trace.method.roles}
    recorder = Recorder(tmp_path, recipe, 4, Console(quiet=True))
    recovery = RecoveryManager(
        recipe,
        trace,
        RunActors(role_workers, groups, {"teacher": ScorerPool(1)}, None, None, None),
        recorder,
        lambda: False,
    )
    for _ in range(3):
        recovery.check_errors([StepDropped("generation 3 was dropped")])
    with pytest.raises(RunError, match="4 times without a step between, the last time a peer did not come"):
        recovery.check_errors([StepDropped("a peer did not come")])
    recorder.close()


def test_a_trainer_that_has_half_a_state_stands_nowhere(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no memory for the rest: nobody may take it to be where that state is from."""
    recipe = quick("ring")
    donor, worker = (TrainerWorker("fake", recipe, n, torch.get_num_threads(), "cpu") for n in range(2))
    donor.take_over(0, 0, None)
    state = donor.state(0)
    with monkeypatch.context() as patched:
        patched.setattr(FlatParameters, "load_state", lambda flat, state: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            worker.take_over(0, 5, state)
    assert worker.progress().phase == -1
    worker.take_over(0, 5, state)
    assert worker.progress() == TrainerProgress(0, 5)
    with monkeypatch.context() as patched:
        patched.setattr(FlatParameters, "__init__", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            worker.start_phase(1, 5)
    assert worker.progress().phase == -1
    worker.start_phase(1, 5)
    assert worker.progress() == TrainerProgress(1, 5)


def test_a_student_that_has_half_its_experts_stands_nowhere(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = quick("ring")
    donor, worker = (StudentWorker("generator", recipe, n, torch.get_num_threads(), "cpu") for n in range(2))
    donor.take_over(0, 0, None)
    expert, state = donor.expert(0), donor.state(0)
    worker.take_over(0, 0, None)
    with monkeypatch.context() as patched:
        patched.setattr(Experts, "load_state", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            worker.take_over(1, 5, state, None, expert)
    assert worker.progress().phase == -1
    worker.take_over(1, 5, state, None, expert)
    assert worker.progress() == TrainerProgress(1, 5)


def test_whose_fault_an_error_is(here: None) -> None:
    class Actor:
        def fail(self) -> None:
            raise KeyError("mine")

        def take(self, value: Any) -> Any:
            return value

        def die(self) -> None:
            os._exit(1)

    first, second = ray.remote(Actor).remote(), ray.remote(Actor).remote()

    def error(reference: Any) -> Exception:
        with pytest.raises(ray.exceptions.RayError) as caught:
            ray.get(reference)
        return caught.value

    mine = error(first.fail.remote())
    assert isinstance(own_fault(mine), KeyError) and isinstance(cause_of(mine), KeyError)
    dead = error(second.die.remote())
    assert own_fault(dead) is None
    through = error(first.take.remote(second.take.remote(1)))  # an innocent who was to take a dead one's result
    assert own_fault(through) is None
    ray.kill(first)
