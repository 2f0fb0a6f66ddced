"""A user's own code: a method with a fourth role, a family, and what is said of plugins that are none."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import ROOT, command
from disturbed import STORE, Story
from ray.cluster_utils import Cluster
from rich.console import Console
from safetensors.torch import load_file

from raydmd.config.plugins import import_plugins, workers_environment
from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.errors import UserError
from raydmd.jsonl import read_lines
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import Reference, train
from raydmd.methods.registry import build_method
from raydmd.models.registry import build_family
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family
from raydmd.runtime.launch import distill

EXAMPLE = str(ROOT / "examples" / "two_fakes.py")
FAMILY = """
from raydmd.models.embedded.ring import RingFamily
from raydmd.models.registry import register_family


@register_family
class OwnFamily(RingFamily):
    name = "own"
"""


def recipe_of(quick: Any, *overrides: str) -> Recipe:
    import_plugins([EXAMPLE])
    given = quick("ring")
    tree = {**yaml.safe_load(dump_recipe(given)), "plugins": [EXAMPLE], "name": "two"}
    tree["method"] = {"name": "two-fakes", "fake_updates": 2, "two_fakes": {"weight": 0.25}}
    path = Path(given.teacher.path or "").parent / "two.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(str(path), ["iterations=[8, 7]", "checkpoint.every=5", *overrides])


def locally(recipe: Recipe, prompts: Any, **options: Any) -> Reference:
    family = recipe_family(recipe)
    return train(recipe, family, family.load_teacher(), prompts("ring"), **options)


def assert_same_bits(folder: Path, expected: Reference) -> None:
    for index, expert in enumerate(expected.experts):
        found = load_file(expert_file(folder, index))
        assert found.keys() == expert.keys() and all(torch.equal(found[name], expert[name]) for name in expert)


def test_a_method_with_a_fourth_role_survives_losses_and_resumes_with_the_same_bits(
    quick: Any, prompts: Any, tmp_path: Path
) -> None:
    """One of two workers of that role is killed, then the only one of another run's, before and after a resume."""
    recipe, folder = recipe_of(quick, "runtime.second.max_workers=2", "runtime.second.cpus=0.25"), tmp_path / "run"
    expected = locally(recipe, prompts)

    def plot(story: Story) -> None:
        story.go_on(2)
        story.until(lambda: len(story.processes("SecondWorker")) == 2)
        os.kill(story.processes("SecondWorker")[0].pid, signal.SIGKILL)
        (recovered,) = story.lost_and_recovered(1)
        assert recovered["roles"] == ["second"] and recovered["steps_lost"] == 0

    Story(recipe.model_copy(update={"iterations": [4000, 7]}), tmp_path / "long", plot).run()
    assert distill(recipe, folder, console=Console(quiet=True), until=6) is False
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["second_version"] for line in lines] == [2 * n for n in range(1, 7)]
    assert all(line["loss_second"] > 0 and line["loss_second"] != line["loss_fake"] for line in lines)
    assert distill(recipe, folder, console=Console(quiet=True)) is True
    assert_same_bits(folder, expected)
    other = locally(recipe_of(quick, "method.two_fakes.weight=0"), prompts)  # the second one counts
    with pytest.raises(AssertionError):
        assert_same_bits(folder, other)


def test_the_only_worker_of_that_role_is_killed(quick: Any, prompts: Any, tmp_path: Path) -> None:
    recipe = recipe_of(quick, "iterations=[4000, 7]")

    def plot(story: Story) -> None:
        story.go_on(7)
        os.kill(story.processes("SecondWorker")[0].pid, signal.SIGKILL)
        (recovered,) = story.lost_and_recovered(1)
        assert recovered["how"] == "rolled_back"
        story.go_on(3)

    story = Story(recipe, tmp_path / "run", plot).run()
    done = len(story.lines())
    expected = locally(recipe, prompts, iterations=done)
    for role in ("generator", "fake", "second"):
        (shard,) = (story.folder / "checkpoints").glob(f"step-{done:06d}/{role}.safetensors")
        state, found = expected.parts[role].flat.state(), load_file(shard)
        assert all(torch.equal(found[name], value) for name, value in state.items()), role


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    small: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False, **small})
    try:
        cluster.add_node(num_cpus=2, resources={"away": 2}, **small)
        yield cluster
    finally:
        cluster.shutdown()


def test_a_plugins_file_reaches_the_workers_of_another_node(
    quick: Any, prompts: Any, two_nodes: Cluster, tmp_path: Path
) -> None:
    """The driver runs elsewhere, and neither node has the file on its path."""
    recipe = recipe_of(quick, "runtime.second.resources={away: 1}")
    place = tmp_path / "elsewhere" / "two_fakes.py"
    place.parent.mkdir()
    place.write_text(Path(EXAMPLE).read_text())
    tree = {**yaml.safe_load(dump_recipe(recipe)), "plugins": []}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["distill", str(tmp_path / "two.yaml"), "--plugin", str(place), "--out", str(tmp_path / "run")]
    on_loopback = {"RAY_ADDRESS": two_nodes.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    with command(arguments, tmp_path / "log", **on_loopback, **token) as run:
        code, output = run.ended(240)
    assert code == 0, output
    assert_same_bits(tmp_path / "run", locally(recipe, prompts))
    assert Run(tmp_path / "run").recipe.plugins == [str(place)]


def test_a_run_names_its_plugins_and_imports_none(quick: Any, tmp_path: Path) -> None:
    """A stranger's folder runs no code: the plugin leaves a mark where it is imported."""
    plugin, mark = tmp_path / "marking.py", tmp_path / "mark"
    plugin.write_text(f"open({str(mark)!r}, 'w').close()\n{Path(EXAMPLE).read_text().replace('two-fakes', 'marked')}")
    tree = yaml.safe_load(dump_recipe(quick("ring")))
    tree["method"] = {"name": "marked"}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**tree, "plugins": [str(plugin)]}))
    for words in (["evaluate"], ["report"], ["serve"], ["generate", "--prompt", "1"]):
        name, *more = words
        result = raydmd(name, str(folder), *more)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "method.name: no method 'marked'" in result.stderr
        assert f"give them: --plugin {plugin}" in result.stderr and not mark.exists()
    result = raydmd("validate", str(folder / "recipe.yaml"))
    assert result.returncode == 2 and f"give them: --plugin {plugin}" in result.stderr and not mark.exists()
    result = raydmd("evaluate", str(folder), "--plugin", str(plugin))
    assert mark.exists() and "has no trained expert yet" in result.stderr


def raydmd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raydmd", *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_recipe_prints_the_methods_own_options() -> None:
    result = raydmd("recipes", "ring", "--plugin", EXAMPLE)
    assert result.returncode == 0 and "two_fakes" not in yaml.safe_load(result.stdout)["method"]
    import_plugins([EXAMPLE])
    recipe = load_recipe("ring", ["method.name=two-fakes", "method.two_fakes.weight=0.3"])
    assert yaml.safe_load(dump_recipe(recipe))["method"]["two_fakes"] == {"weight": 0.3}
    again = load_recipe("ring", ["method.name=two-fakes"])
    assert yaml.safe_load(dump_recipe(again))["method"]["two_fakes"] == {"weight": 0.5}


def test_a_family_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own_family.py").write_text(FAMILY)
    import_plugins([str(tmp_path / "own_family.py")])
    assert build_family("own").name == "own"
    environment = workers_environment()
    assert str(tmp_path / "own_family.py") in environment["py_modules"]
    assert "own_family" in environment["env_vars"]["RAYDMD_PLUGINS"].split(",")


def test_an_installed_package_offers_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported when a recipe names it, also a stranger's: it is on this machine by its user's own will."""
    source = Path(EXAMPLE).read_text().replace("@register_method\n", "").replace("two-fakes", "installed")
    (tmp_path / "installed_method.py").write_text(source)
    (tmp_path / "installed_method-1.0.dist-info").mkdir()
    (tmp_path / "installed_method-1.0.dist-info" / "METADATA").write_text("Name: installed-method\nVersion: 1.0\n")
    (tmp_path / "installed_method-1.0.dist-info" / "entry_points.txt").write_text(
        "[raydmd.methods]\ninstalled = installed_method:TwoFakes\nbroken = no_such_module:Method\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_recipe("ring", ["method.name=installed", "method.two_fakes.weight=0.1"])
    assert build_method(recipe).trained() == ["generator", "fake", "second"]
    with pytest.raises(UserError, match="no method 'instaled'; did you mean 'installed'"):
        load_recipe("ring", ["method.name=instaled"])
    with pytest.raises(UserError, match="'no_such_module:Method' cannot be imported: No module named"):
        load_recipe("ring", ["method.name=broken"])


BROKEN = {
    "no file": ("there_is_none.py", "", "plugins: no file '"),
    "no module": ("there_is_none", "", "plugins: no module 'there_is_none'; a file is named with its ending"),
    "its own error": ("own_error.py", "x = 1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    "a syntax error": ("syntax.py", "def", "cannot be imported: SyntaxError"),
    "what it needs": ("needs.py", "import no_such_module", "cannot be imported: No module named 'no_such_module'"),
    "a name twice": (
        "twice.py",
        "from raydmd.methods.phased import PhasedDMD\nfrom raydmd.methods.registry import register_method\n"
        "register_method(type('Other', (PhasedDMD,), {'name': 'phased'}))",
        "there is a method 'phased' already (raydmd.methods.phased.PhasedDMD)",
    ),
    "another module's name": ("json.py", "", "a module 'json' is there already; rename the file"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_plugins_that_are_none_get_one_line(what: str, tmp_path: Path) -> None:
    name, text, told = BROKEN[what]
    path = tmp_path / name
    if text or what == "another module's name":
        path.write_text(text)
    plugin = str(path) if name.endswith(".py") else name
    with pytest.raises(UserError) as caught:
        load_recipe("ring", plugins=[plugin])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    result = raydmd("recipes", "ring", "--plugin", plugin)
    assert result.returncode == 2 and told in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method.two_fakes.weight=0.3"], "method.two_fakes: an option of two-fakes, not of phased"),
        (["method.name=two-fakes", "method.two_fakes.wait=1"], "'method.two_fakes.wait'; did you mean 'weight'?"),
        (["method.name=two-fakes", "method.two_fakes.weight=2"], "method.two_fakes.weight"),
        (["runtime.second.max_workers=2"], "unknown key 'runtime.second'"),
        (["runtime.techer.max_workers=2"], "unknown key 'runtime.techer'; did you mean 'teacher'?"),
        (["runtime.max_stalenes=1"], "unknown key 'runtime.max_stalenes'; did you mean 'max_staleness'?"),
        (["optimizer.teacher.lr=1"], "unknown key 'optimizer.teacher'"),
        (["method.name=two-fake"], "no method 'two-fake'; did you mean 'two-fakes'?"),
    ],
)  # fmt: skip
def test_options_of_another_method_and_roles_that_there_are_not(overrides: list[str], told: str) -> None:
    import_plugins([EXAMPLE])
    with pytest.raises(UserError) as caught:
        load_recipe("ring", overrides)
    assert told in str(caught.value) and "\n" not in str(caught.value)
