"""Workers of every role come and go while a run goes on, and it ends with the bits of one that nothing happened to."""

from pathlib import Path
from typing import Any

import held
import pytest
import ray
from disturbed import (
    Story,
    add_node,
    assert_bits_of_the_reference,
    drain,
    freeze_node,
    kill_node,
    on_node,
    several_nodes,
)

from raydmd.runtime.workers.trainer_group import TrainerGroup
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.teacher import Scorer

BOTH = {"generator", "fake", "teacher"}
LONG = ["iterations=[6, 100000]", "checkpoint.every=10"]


def workers(count: int, *more: str, kind: str = "") -> list[str]:
    """Recipe settings: up to ``count`` workers a role, one a node of this kind."""
    roles = ("generator", "fake", "teacher")
    settings = [f"runtime.{r}={{max_workers: {count}, cpus: 0, resources: {{{r}{kind}: 1}}}}" for r in roles]
    return [*LONG, *settings, *more]


def room(kind: str = "") -> dict[str, float]:
    """The resources of a node for one worker of each role."""
    return {f"{role}{kind}": 1 for role in BOTH}


@pytest.fixture(scope="module")
def nodes():
    ray.cloudpickle.register_pickle_by_value(held)  # the workers do not have this file
    with several_nodes(room(), room()) as cluster:
        yield cluster


def test_every_role_and_helper_is_killed_at_any_moment(nodes: Any, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """The helpers, each role's process, two at once, one after another within a recovery, and a whole group.

    Helpers come back by themselves, and what they were asked is done.
    """

    def plot(story: Story) -> None:
        story.go_on(8)  # into the second phase
        for name in ("PromptStream", "CheckpointWriter", "ControlCaller"):
            (process,) = story.processes(name)
            process.kill()
            story.until(lambda name=name, old=process: [p for p in story.processes(name) if p.pid != old.pid])
            story.go_on(15)  # over a checkpoint
        for helper in ("checkpoint writer", "control caller"):  # each was heard of before it was killed
            story.until(lambda helper=helper: story.events("helper-recovered", helper=helper))
        told = {event["helper"]: event["why"] for event in story.events("helper-lost")}
        assert told["checkpoint writer"] == told["control caller"] == "its process was killed or crashed"
        story.until(lambda: len(story.events("checkpoint")) >= 4)
        saved = [event["iteration"] for event in story.events("checkpoint")]
        assert len(saved) == len(set(saved))
        # and they are needed for all of these
        for count, role in enumerate(("teacher", "generator", "fake"), start=1):
            story.kill(role)
            (recovered,) = story.lost_and_recovered(count)[-1:]
            assert recovered["roles"] == [role] and recovered["steps_lost"] == 0 and recovered["seconds"] > 0
            story.complete()
        # both trained roles within one iteration
        story.kill("generator", 1)
        story.kill("fake", 1)
        story.lost_and_recovered(5)
        # and again while the newcomers are on their way
        story.complete()
        story.kill("fake", 0)
        story.until(lambda: len(story.events("worker-lost")) >= 6)
        story.kill("generator", 0)
        story.lost_and_recovered(7)
        assert all(event["steps_lost"] == 0 for event in story.events("recovered"))
        story.complete()
        # whole groups
        story.kill("fake", 0, 1)
        (recovered,) = story.lost_and_recovered(9)[-1:]
        assert 0 <= recovered["steps_lost"] <= 10 + 3 and recovered["how"] == "rolled_back"
        story.complete()
        story.kill("teacher", 0, 1)
        assert story.lost_and_recovered(11)[-1]["steps_lost"] == 0
        story.complete()

    story = Story(quick("ring", *workers(2)), tmp_path / "run", plot).run()
    assert story.finished is False
    assert_bits_of_the_reference(story, prompts)
    for event in story.events("worker-lost"):
        assert event["why"] and event["node"] and event["left"] in (0, 1)


def test_nodes_vanish_and_appear(nodes: Any, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """A run begins with a worker a role, grows onto a node, loses a node with all roles at once, and grows again.

    With the teacher's pairs, which newcomers need, too.
    """
    add_node(nodes, room("-v"))

    def plot(story: Story) -> None:
        story.go_on(4)
        assert {line["roles"][role]["workers"] for line in story.lines() for role in BOTH} == {1}
        second = add_node(nodes, room("-v"))
        story.complete()
        assert {event["role"] for event in story.events("resized")} == BOTH
        kill_node(second)
        recoveries = story.lost_and_recovered(3)
        assert {role for event in recoveries for role in event["roles"]} == BOTH
        assert [event["steps_lost"] for event in recoveries] == [0] * len(recoveries)
        story.go_on(5)
        assert all(figures["workers"] == 1 for figures in story.lines()[-1]["roles"].values())
        story.until(lambda: len(story.events("waiting")) >= 3)
        add_node(nodes, room("-v"))
        story.complete()

    regression = ["method.name=dmd", "method.regression={weight: 0.5, pairs: 64}", "iterations=100000"]
    story = Story(quick("ring", *workers(2, *regression, kind="-v")), tmp_path / "run", plot).run()
    assert story.events("started")[0]["workers"] == {"teacher": 1, "fake": 1, "generator": 1}
    assert_bits_of_the_reference(story, prompts)


@pytest.mark.ray_private
def test_work_leaves_a_draining_node(nodes: Any, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """A notice for a node of each role's second worker; then for the only node, with nowhere to go until one comes."""
    first, second = add_node(nodes, room("-d")), add_node(nodes, room("-d"))

    def plot(story: Story) -> None:
        story.go_on(8)
        drain(nodes, second, seconds=600)
        story.until(lambda: len(story.events("notice")) >= 3)
        story.until(lambda: all(f["workers"] == 1 for f in story.lines()[-1]["roles"].values()))
        story.until(lambda: not on_node(second))
        kill_node(second)  # nobody minds
        story.go_on(5)
        assert story.events("worker-lost") == [] and story.events("recovered") == []
        left = [event for event in story.events("resized") if event["left"]]
        assert {event["role"] for event in left} == BOTH
        # the last node: its trainers stay until the date is near, then the run waits, at no loss
        drain(nodes, first, seconds=8)
        story.until(lambda: len(story.events("worker-lost")) >= 2)
        kill_node(first)
        add_node(nodes, room("-d"))
        story.until(lambda: story.events("recovered"))
        assert [event["steps_lost"] for event in story.events("recovered")] == [0]
        story.go_on(5)

    story = Story(quick("ring", *workers(2, kind="-d")), tmp_path / "run", plot).run()
    assert_bits_of_the_reference(story, prompts)


def test_a_fake_score_that_is_ahead_on_stale_rollouts_is_no_reason_to_go_back(
    nodes: Any, quick: Any, tmp_path: Path
) -> None:
    """The generator's update is held while the fake score trains on the next iteration's; then a generator is lost."""
    for role in ("fake", "generator"):
        (tmp_path / role).mkdir()

    def plot(story: Story) -> None:
        story.go_on(12)
        (tmp_path / "generator/hold-update").touch()
        story.until(lambda: (tmp_path / "generator/held-update").exists())
        iteration = int((tmp_path / "generator/held-update").read_text())
        ahead = (iteration + 2) * recipe.method.fake_updates - 1
        story.until(lambda: int((tmp_path / "fake/at-update").read_text()) >= ahead)
        story.kill("generator")
        story.until(lambda: story.events("worker-lost"))
        (tmp_path / "generator/hold-update").unlink()
        (recovered,) = story.lost_and_recovered(1)
        assert (recovered["steps_lost"], recovered["how"]) == (0, "reformed")
        assert recovered["iteration"] == iteration
        story.until(lambda: story.events("checkpoint", iteration=40))
        story.go_on(3)

    alone = ["runtime.fake.max_workers=1", "runtime.teacher.max_workers=1"]
    recipe = quick("ring", *workers(2, "checkpoint.every=40", "runtime.max_staleness=1", *alone))
    parts = {
        "fake": held.held(Fake, "update", tmp_path / "fake"),
        "generator": held.held(Generator, "update", tmp_path / "generator"),
    }
    story = Story(recipe, tmp_path / "run", plot, parts=parts).run()
    lines = story.lines()
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    assert [line["staleness"] for line in lines[-4:]].count(1) >= 3


def test_who_leaves_is_freed_of_a_silent_peer_and_hands_its_state_on(
    nodes: Any, quick: Any, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers leave at an edge while fake updates before it go on; then the node of those that stay falls silent."""
    stays, leaves = add_node(nodes, room("-l")), add_node(nodes, room("-l"))
    formed, form = [], TrainerGroup.form

    def noted(group: TrainerGroup, workers: list[Any]) -> Any:
        formed.append((group.role, [worker.identity.node for worker in workers]))
        return form(group, workers)

    monkeypatch.setattr(TrainerGroup, "form", noted)

    def plot(story: Story) -> None:
        story.complete()
        for method in ("update", "score"):
            (tmp_path / f"hold-{method}").touch()
        story.until(lambda: (tmp_path / "held-update").exists() and (tmp_path / "held-score").exists())
        drain(nodes, leaves, seconds=600)
        story.until(lambda: len(story.events("notice")) == 3)
        formed.clear()
        (tmp_path / "hold-score").unlink()
        story.until(lambda: sorted(formed) == [("fake", [stays.node_id]), ("generator", [stays.node_id])])
        freeze_node(stays)
        (tmp_path / "hold-update").unlink()
        story.until(lambda: len(story.events("worker-lost")) >= 3)
        add_node(nodes, room("-l"))
        story.until(lambda: story.events("recovered"))
        (recovered,) = story.events("recovered")
        assert (recovered["steps_lost"], recovered["how"]) == (0, "reformed")
        story.until(lambda: not on_node(leaves))
        story.go_on(5)
        assert {event["node"] for event in story.events("worker-lost")} == {stays.node_id}
        kill_node(stays)

    parts = {"fake": held.held(Fake, "update", tmp_path), "teacher": held.held(Scorer, "score", tmp_path)}
    story = Story(quick("ring", *workers(2, kind="-l")), tmp_path / "run", plot, parts=parts).run()
    assert_bits_of_the_reference(story, prompts)
