"""Every method on Ray against the local executor, to the bit, with several workers a role and after a stop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import several_nodes
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
    "dmd": ["method.dmd.reference_samples=true", "method.regression.weight=0.25", "method.regression.pairs=64"],
    "dmd2": ["method.dmd2.references=64", "method.dmd2.generator_weight=0.1", "method.discriminator.width=16"],
    "tdm": [],
    "sid": [
        "method.phases=2",
        "optimizer.generator.schedule=cosine",
        "optimizer.generator.warmup=1",
        "optimizer.fake.schedule=linear",
        "optimizer.fake.final=0.2",
    ],
    "adm": [*SMALL, "method.phases=2"],
    "adp": ["method.discriminator.width=16", "method.adp.pairs=64", "optimizer.latent.lr=1e-3"],
    "dmdx": [*SMALL, "method.adp.iterations=4", "method.adp.pairs=64", "optimizer.latent.lr=1e-3"],
}
SHORTER = {"tdm": 5}  # a run that is finished is then given more iterations
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
    """And after stops in the middle, from which the run goes on, and of a run that was shorter at first."""
    data = "digits" if name != "tdm" else "ring"
    roles = build_method(quick(data, *settings(name))).roles
    several = [f"runtime.{role}={{max_workers: 2, cpus: 0.1}}" for role in roles]
    recipe = quick(data, *settings(name, *several))
    family, quiet, folder = recipe_family(recipe), Console(quiet=True), tmp_path / "run"

    def reference(iterations: int | None = None) -> Reference:
        return train(recipe, family, family.load_teacher(), prompts(recipe.teacher.family), iterations=iterations)

    for until in STOPS.get(name, ()):
        assert distill(recipe, folder, console=quiet, until=until) is False
        assert_states(folder, until, reference(until).parts, build_method(recipe).trained())
    if name in SHORTER:
        shorter = quick(data, *settings(name, *several), f"iterations={SHORTER[name]}")
        assert distill(shorter, folder, console=quiet) is True
    assert distill(recipe, folder, console=quiet) is True
    experts = reference().experts
    assert len(experts) == len(build_method(recipe).phases(family.schedule.t_max))
    for index, expert in enumerate(experts):
        found = load_file(expert_file(folder, index))
        assert all(torch.equal(found[key], value) for key, value in expert.items())


def assert_states(folder: Path, iteration: int, parts: dict[str, Any], roles: list[str]) -> None:
    found = Archive(str(folder / "checkpoints")).newest()
    assert found.manifest is not None and found.manifest.iteration == iteration
    assert set(roles) <= set(found.shards)
    for role in roles:
        for key, value in parts[role].flat.state().items():
            assert torch.equal(torch.as_tensor(found.shards[role][key]), value), (role, key)
