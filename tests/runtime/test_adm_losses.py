"""ADM's chain of calls through roles, cut at every place by the death of the worker that is next."""

from pathlib import Path
from typing import Any

import dying
import ray
from disturbed import Story, assert_bits_of_the_reference, wait_until

ADM = [
    "method.name=adm", "method.phases=2", "method.discriminator.width=16", "optimizer.discriminator.lr=1e-3",
    "iterations=[4000, 4]", "checkpoint.every=3",
]  # fmt: skip
CHAIN = [
    ("generator", "propose"), ("fake", "step"), ("teacher", "step"), ("discriminator", "update"),
    ("discriminator", "vjp"), ("fake", "step_vjp"), ("generator", "update"),
]  # fmt: skip


def test_a_worker_dies_between_each_two_calls_of_adms_chain(quick: Any, prompts: Any, tmp_path: Path) -> None:
    """One of two of a role, as its call begins: the same bits, no step lost, whichever call it is."""
    roles = ("generator", "fake", "discriminator", "teacher")
    several = [f"runtime.{role}={{max_workers: 2, cpus: 0.2}}" for role in roles]
    recipe = quick("ring", *ADM, *several)

    def plot(story: Story) -> None:
        for count, (role, call) in enumerate(CHAIN, start=1):
            wait_until(lambda role=role: story.lines() and story.lines()[-1]["roles"][role]["workers"] == 2)
            (tmp_path / f"{role}-{call}").touch()
            recovered = story.lost_and_recovered(count)[-1]
            assert recovered["roles"] == [role] and recovered["steps_lost"] == 0, (role, call)
            assert not (tmp_path / f"{role}-{call}").exists()
        story.go_on(3)

    ray.cloudpickle.register_pickle_by_value(dying)  # the workers do not have this file
    parts = {role: dying.dying(role, [call for of, call in CHAIN if of == role], tmp_path) for role in roles}
    story = Story(recipe, tmp_path / "run", plot, parts=parts).run()
    assert_bits_of_the_reference(story, prompts)
