"""A user's own code: a method with a fourth role, a family, and what is said of plugins that are none."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from commands import ROOT, command
from disturbed import STORE, Story, assert_bits_of_the_reference
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.cli import run
from raydmd.config.plugins import import_plugins, workers_environment
from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import Reference, train
from raydmd.methods.registry import build_method
from raydmd.models.registry import build_family
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run, recipe_family

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


def locally(recipe: Recipe, prompts: Any) -> Reference:
    family = recipe_family(recipe)
    return train(recipe, family, family.load_teacher(), prompts("ring"))


def assert_same_bits(folder: Path, expected: Reference) -> None:
    for index, expert in enumerate(expected.experts):
        found = load_file(expert_file(folder, index))
        assert found.keys() == expert.keys() and all(torch.equal(found[name], expert[name]) for name in expert)


def cli(*arguments: str) -> int:
    return run(list(arguments))


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A cluster that drivers join by its address, each with its own plugins."""
    small: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": STORE}
    lean = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, **lean, **small})
    try:
        cluster.add_node(num_cpus=2, resources={"away": 2}, **small)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_method_with_a_fourth_role_survives_losses_and_resumes_with_the_same_bits(
    quick: Any, prompts: Any, two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two workers of that role is killed; after a stop and a resume with one of them, that one."""
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)

    def kill_one(story: Story) -> None:
        story.go_on(2)
        story.until(lambda: len(story.processes("SecondWorker")) == 2)
        os.kill(story.processes("SecondWorker")[0].pid, signal.SIGKILL)
        (recovered,) = story.lost_and_recovered(1)
        assert recovered["roles"] == ["second"] and recovered["steps_lost"] == 0

    def kill_the_only_one(story: Story) -> None:
        story.until(lambda: len(story.events("started")) == 2)
        story.go_on(7)
        (second,) = story.processes("SecondWorker")
        second.kill()
        assert story.lost_and_recovered(2)[-1]["how"] == "rolled_back"
        story.go_on(3)

    long = "iterations=[4000, 7]"
    recipe = recipe_of(quick, long, "runtime.second.max_workers=2", "runtime.second.cpus=0.25")
    story = Story(recipe, tmp_path / "run", kill_one).run()
    assert story.finished is False
    lines = story.lines()
    assert [line["second_version"] for line in lines] == [2 * n for n in range(1, len(lines) + 1)]
    assert all(line["loss_second"] > 0 and line["loss_second"] != line["loss_fake"] for line in lines)
    assert_bits_of_the_reference(story, prompts)

    story = Story(recipe_of(quick, long), story.folder, kill_the_only_one).run()
    assert [event["resumed"] for event in story.events("started") if "resumed" in event] == [len(lines)]
    assert_bits_of_the_reference(story, prompts)
    story.recipe = recipe_of(quick, long, "method.two_fakes.weight=0")
    with pytest.raises(AssertionError):  # the second one counts
        assert_bits_of_the_reference(story, prompts)


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
    with command(arguments, tmp_path / "log", **on_loopback, **token) as started:
        code, output = started.ended(240)
    assert code == 0, output
    assert_same_bits(tmp_path / "run", locally(recipe, prompts))
    assert Run(tmp_path / "run").recipe.plugins == [str(place)]


def test_a_run_names_its_plugins_and_imports_none(
    quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        assert cli(name, str(folder), *more) == 2
        error = capsys.readouterr().err
        assert "method.name: no method 'marked'" in error and error.count("\n") == 1
        assert f"give them: --plugin {plugin}" in error and not mark.exists()
    assert cli("validate", str(folder / "recipe.yaml")) == 2
    assert f"give them: --plugin {plugin}" in capsys.readouterr().err and not mark.exists()
    cli("evaluate", str(folder), "--plugin", str(plugin))
    assert mark.exists() and "has no trained expert yet" in capsys.readouterr().err


def test_a_recipe_prints_the_methods_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("recipes", "ring", "--plugin", EXAMPLE) == 0
    assert "two_fakes" not in yaml.safe_load(capsys.readouterr().out)["method"]
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
def test_plugins_that_are_none_get_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, text, told = BROKEN[what]
    path = tmp_path / name
    if text or what == "another module's name":
        path.write_text(text)
    plugin = str(path) if name.endswith(".py") else name
    with pytest.raises(UserError) as caught:
        load_recipe("ring", plugins=[plugin])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert cli("recipes", "ring", "--plugin", plugin) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


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
