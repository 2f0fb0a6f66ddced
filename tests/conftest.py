"""What several test files share: small teachers, recipes that run in a second, prompts."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import beyond_loopback
from run_folders import make_run
from worker_forks import forked_workers

import raydmd.runtime  # before Ray: what it starts here then listens on loopback only  # noqa: F401
from raydmd.config import plugins
from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import METHODS
from raydmd.models.base import save_teacher
from raydmd.models.embedded.prompts import ensure_embedded_prompts
from raydmd.models.registry import FAMILIES
from raydmd.runs.run import recipe_family
from raydmd.training.collective import Alone
from raydmd.training.pretraining import Pretraining

torch.set_num_threads(1)

_looked_at: set[str] = set()  # Rays of this process


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let Ray's workers be started as Ray does it, five seconds of imports each."""
    words = "start Ray's workers as Ray does, not as forks of a process that has torch and diffusers imported"
    parser.addoption("--spawn-workers", action="store_true", help=words)


@pytest.fixture(scope="session", autouse=True)
def rays_workers_are_forked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fork the workers of every Ray that these tests start in their own process, where some test does."""
    own = request.config.getoption("--spawn-workers")
    if own or all("unit" in item.keywords for item in request.session.items):
        yield
    else:
        with forked_workers(tmp_path_factory.mktemp("forks")):
            yield


@pytest.fixture(autouse=True)
def rays_listen_on_loopback_only() -> Iterator[None]:
    """Look once at every Ray that a test, or a fixture that it uses, has started in this process."""
    yield
    import ray

    if ray.is_initialized() and (session := ray._private.worker._global_node.session_name) not in _looked_at:
        _looked_at.add(session)
        elsewhere, _ = beyond_loopback(psutil.Process().children(recursive=True))
        assert elsewhere == []


@pytest.fixture(autouse=True)
def plugins_end_with_their_test() -> Iterator[None]:
    """Forget the methods, families and modules that a test's plugins have added: other tests count what there is."""
    registries: list[dict[str, Any]] = [METHODS, FAMILIES]
    before, imported = [dict(registry) for registry in registries], list(plugins._imported)
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)
    for name in set(plugins._imported) - set(imported):
        sys.modules.pop(plugins.module_name(name), None)
    plugins._imported[:] = imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folder that it is in."""
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])


def pytest_collection_finish() -> None:
    """Have the collector leave out what was imported: torch and diffusers alone take it half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Give all of it back, for the end of the process."""
    gc.unfreeze()


SMALL = {
    "ring": ["teacher.options={width: 32, depth: 2}", "pretrain.batch=64", "pretrain.micro=64"],
    "digits": ["teacher.options={width: 32, depth: 1, ratio: 2}", "pretrain.batch=32", "pretrain.micro=32"],
}
QUICK = [
    "batch.size=16", "batch.micro=4", "iterations=4", "method.fake_updates=2", "monitor.samples_every=0",
    "monitor.tensorboard=false", "checkpoint.every=100", "ema=0.5",
]  # fmt: skip


def train_teacher(recipe: Recipe, folder: Path) -> Path:
    """Train the recipe's teacher in this process into ``folder``."""
    training = Pretraining(recipe, recipe_family(recipe))
    for iteration in range(recipe.pretrain.iterations):
        training.step(iteration, 0, 1, Alone())
    save_teacher(training.teacher(), folder, recipe.teacher.family, training.family.options)
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small, briefly trained teachers by family."""
    root = tmp_path_factory.mktemp("teachers")
    return {
        family: train_teacher(load_recipe(family, [*small, "pretrain.iterations=200"]), root / family)
        for family, small in SMALL.items()
    }


@pytest.fixture(scope="session")
def quick(teachers: dict[str, Path]):
    """Return a maker of small recipes: ``quick("ring", "method.name=dmd", ...)``."""

    def make(family: str, *overrides: str) -> Recipe:
        return load_recipe(family, [f"teacher.path={teachers[family]}", *QUICK, *overrides])

    return make


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory):
    """Return a reader of a family's own prompts."""
    root = tmp_path_factory.mktemp("prompts")

    def table(family: str) -> PromptTable:
        made = recipe_family(load_recipe(family))
        return PromptTable(ensure_embedded_prompts(made, root), made.condition_columns)

    return table


@pytest.fixture(scope="session")
def served_runs(quick, prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on digits: full experts, LoRA experts, and steps with fresh noise."""
    root = tmp_path_factory.mktemp("runs")
    more = {
        "full": [],
        "lora": ["method.experts.kind=lora", "method.experts.rank=4", "optimizer.generator.lr=0.01"],
        "renoise": ["method.solver=renoise"],
    }
    for name, overrides in more.items():
        make_run(quick("digits", *overrides), root / name, prompts("digits"))
    return {name: root / name for name in more}
