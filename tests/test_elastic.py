"""Workers of every role come and go while a run goes on, and it ends with the bits of one that nothing happened to."""

from pathlib import Path
from typing import Any

import pytest
from disturbed import Story, assert_bits_of_the_reference, several_nodes

BOTH = {"generator": 1, "fake": 1, "teacher": 1}
LONG = ["iterations=[6, 100000]", "checkpoint.every=10"]


def workers(count: int) -> list[str]:
    """Recipe settings: up to ``count`` workers a role, one a node."""
    return [
        f"runtime.{role}={{max_workers: {count}, cpus: 0, resources: {{{role}: 1}}}}"
        for role in ("generator", "fake", "teacher")
    ]


@pytest.fixture(scope="module")
def nodes():
    with several_nodes(BOTH, BOTH) as cluster:
        yield cluster


def test_every_role_is_killed_at_any_moment(nodes: Any, quick: Any, prompts: Any, tmp_path: Path) -> None:
    """Each role's process, two at once, one after another within a recovery, a whole group, and the helpers."""

    def plot(story: Story) -> None:
        story.go_on(8)  # into the second phase
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
        assert 0 <= recovered["steps_lost"] <= 10 + 3 and "manifest" in recovered["how"]
        story.complete()
        story.kill("teacher", 0, 1)
        assert story.lost_and_recovered(11)[-1]["steps_lost"] == 0
        story.complete()

    story = Story(quick("ring", *LONG, *workers(2)), tmp_path / "run", plot).run()
    assert story.finished is False
    assert_bits_of_the_reference(story, prompts)
    for event in story.events("worker-lost"):
        assert event["why"] and event["node"] and event["left"] in (0, 1)
