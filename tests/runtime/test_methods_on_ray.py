"""Every method on Ray against the local executor, to the bit, with several workers a role and after a stop.

And ADM's chain of calls through roles, cut at every place by the death of the worker that is next.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dying
import pytest
import ray
import torch
from disturbed import Story, assert_bits_of_the_reference, several_nodes, wait_until
from rich.console import Console
from safetensors.torch import load_file

from raydmd.methods.local import Reference, train
from raydmd.methods.registry import build_method
from raydmd.runs.folders import expert_file
from raydmd.runs.run import recipe_family
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.launch import distill

SMALL = ["method.discriminator.width=16", "optimizer.discriminator.lr=1e-3"]
OPTIONS = {
    "dmd": [
        "method.dmd.reference_samples=true", "method.regression.weight=0.5", "method.regression.pairs=300",
        "optimizer.generator.betas=[0, 0.999]",
    ],
    "dmd2": ["method.dmd2.references=64", "method.dmd2.generator_weight=0.1", "method.discriminator.width=16"],
    "tdm": [],
    "sid": [
        "method.phases=2", "optimizer.generator.schedule=cosine", "optimizer.generator.warmup=1",
        "optimizer.fake.schedule=linear", "optimizer.fake.final=0.2",
    ],
    "adm": [*SMALL, "method.phases=2"],
    "adp": ["method.discriminator.width=16", "method.adp.pairs=64", "optimizer.latent.lr=1e-3"],
    "dmdx": [*SMALL, "method.adp.iterations=4", "method.adp.pairs=64", "optimizer.latent.lr=1e-3"],
}  # fmt: skip
SHORTER = {"tdm": 5}  # a run that is finished is then given more iterations
MORE_THAN_MICRO_BATCHES = {"dmd": ["batch.micro=8", "runtime.fake.max_workers=3", "runtime.teacher.max_workers=2"]}
STOPS = {"dmd2": [5], "sid": [5], "dmdx": [3, 5]}  # dmdx: in either of its stages


def settings(name: str, *more: str) -> list[str]:
    return [f"method.name={name}", *OPTIONS[name], "iterations=8", "checkpoint.every=3", *more]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    with several_nodes({"other": 4.0}):
        yield


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_bits_with_several_workers(
    two_nodes: None, quick: Any, prompts: Any, tmp_path: Path, name: str
) -> None:
    """Two workers of each trained role, for one method more than there are micro-batches, and of the teacher, too.

    And after stops in the middle, from which the run goes on with one worker a role, and of a run that was shorter at
    first.
    """
    data = "digits" if name != "tdm" else "ring"
    roles = build_method(quick(data, *settings(name))).trained()
    several = [f"runtime.{role}={{max_workers: 2, cpus: 0.1}}" for role in roles]
    recipe = quick(data, *settings(name, *several, *MORE_THAN_MICRO_BATCHES.get(name, ())))
    alone = quick(data, *settings(name, *(f"runtime.{role}.cpus=0.1" for role in roles)))
    family, quiet, folder = recipe_family(recipe), Console(quiet=True), tmp_path / "run"

    def reference(iterations: int | None = None) -> Reference:
        return train(recipe, family, family.load_teacher(), prompts(recipe.teacher.family), iterations=iterations)

    for number, until in enumerate(STOPS.get(name, ())):
        assert distill(alone if number else recipe, folder, console=quiet, until=until) is False
        assert_states(folder, until, reference(until).parts, build_method(recipe).trained())
    if name in SHORTER:
        shorter = quick(data, *settings(name, *several), f"iterations={SHORTER[name]}")
        assert distill(shorter, folder, console=quiet) is True
    last = alone if name in STOPS or name in SHORTER else recipe
    assert distill(last, folder, console=quiet) is True
    experts = reference().experts
    assert len(experts) == len(build_method(recipe).phases(family.schedule.t_max))
    assert is_same(folder, experts)
    if name == "dmd":  # and the measure tells another run's
        other = recipe.model_copy(update={"seed": 1})
        assert not is_same(folder, train(other, family, family.load_teacher(), prompts(data)).experts)


def is_same(folder: Path, experts: list[dict[str, torch.Tensor]]) -> bool:
    files = [load_file(expert_file(folder, index)) for index in range(len(experts))]
    return all(
        found.keys() == expert.keys() and all(torch.equal(found[key], value) for key, value in expert.items())
        for found, expert in zip(files, experts, strict=True)
    )


def assert_states(folder: Path, iteration: int, parts: dict[str, Any], roles: list[str]) -> None:
    found = Archive(str(folder / "checkpoints")).newest()
    assert found.manifest is not None and found.manifest.iteration == iteration
    assert set(roles) <= set(found.shards)
    for role in roles:
        for key, value in parts[role].flat.state().items():
            assert torch.equal(torch.as_tensor(found.shards[role][key]), value), (role, key)


ADM = [
    "method.name=adm", "method.phases=2", "method.discriminator.width=16", "optimizer.discriminator.lr=1e-3",
    "iterations=[4000, 4]", "checkpoint.every=3",
]  # fmt: skip
CHAIN = [
    ("generator", "propose"), ("fake", "step"), ("teacher", "step"), ("discriminator", "update"),
    ("discriminator", "vjp"), ("fake", "step_vjp"), ("generator", "update"),
]  # fmt: skip


def test_a_worker_dies_between_each_two_calls_of_adms_chain(
    two_nodes: None, quick: Any, prompts: Any, tmp_path: Path
) -> None:
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
