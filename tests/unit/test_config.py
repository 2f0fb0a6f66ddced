"""The recipe: what is refused, in which words, and what comes back from a file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import raydmd
from raydmd.config.recipe import Recipe, dump_recipe, shipped_recipes
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe, parse_recipe
from raydmd.methods.registry import plan_phases
from raydmd.sampling.plan import plan_iterations

PACKAGE = Path(raydmd.__file__).parent

WRONG = {  # what is set, and what the error must say
    "method.phazes=2": ["method.phazes", "did you mean 'phases'?"],
    "runtime.teacher.cpu=2": ["runtime.teacher.cpu", "did you mean 'cpus'?"],
    "optimizer.generator.beta=[0, 0.9]": ["optimizer.generator.beta'", "did you mean 'betas'?"],
    "metod.name=dmd": ["metod", "did you mean 'method'?"],
    "method.experts.rnk=4": ["method.experts.rnk", "did you mean 'rank'?"],
    "zzz=1": ["'zzz'", "iterations", "evaluation"],
    "iterations=many": ["iterations: ", "'many'"],
    "iterations=0": ["iterations: ", "greater than 0"],
    "iterations=[3, 0]": ["iterations.1: ", "greater than 0"],
    "batch.size=0": ["batch.size", "greater than 0"],
    "batch.micro=7": ["batch.micro (7)", "batch.size (256)"],
    "pretrain.micro=7": ["pretrain.micro (7)", "pretrain.batch (512)"],
    "pretrain.min_workers=3": ["pretrain.max_workers (2)", "min_workers (3)"],
    "runtime.fake.min_workers=3": ["runtime.fake", "max_workers (1)", "min_workers (3)"],
    "ema=1": ["ema", "less than 1"],
    "seed=-1": ["seed", "-1"],
    "optimizer.fake.lr=0": ["optimizer.fake.lr", "greater than 0"],
    "optimizer.fake.lr=.inf": ["optimizer.fake.lr", "finite"],
    "optimizer.fake.betas=[0]": ["optimizer.fake.betas"],
    "optimizer.fake.betas=[0, 1.5]": ["optimizer.fake.betas.1", "less than 1"],
    "method.clamp=-1": ["method.clamp", "greater than 0"],
    "method.score_margin=0.5": ["method.score_margin", "less than 0.5"],
    "method.solver=heun": ["method.solver", "'euler' or 'renoise'", "'heun'"],
    "method.regression.weight=heavy": ["method.regression.weight", "'heavy'"],
    "method.score_interval=fixed": ["method.fixed_t"],
    "method.fixed_t=0.5": ["method.fixed_t", "fixed"],
    "method=phased": ["'method' is a section", "'phased'", "its keys: name, steps, phases"],
    "runtime.fake=2": ["'runtime.fake' is a section", "its keys: min_workers, max_workers"],
    "runtime.fake.labels={zone: 1}": ["runtime.fake.labels.zone"],
    "runtime.fake=null": ["runtime.fake", "its keys: min_workers"],
    "name=[1]": ["name"],
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_key(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("ring", [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(words in message for words in WRONG[override]), message
    assert message.startswith(f"--set {override}: ")  # the file is not to blame


def test_a_key_that_was_renamed_is_read_by_either_name(tmp_path: Path) -> None:
    """Recipes of older runs, files and --set; of both at once the file's old one is refused."""
    file, old, new = tmp_path / "r.yaml", "prompts.encoders", "prompts.stream_workers"
    file.write_text("method: {name: dmd}\nprompts: {encoders: 3}\n")
    assert load_recipe(str(file)).prompts.stream_workers == 3
    assert load_recipe(str(file), [f"{new}=4"]).prompts.stream_workers == 4
    assert load_recipe("ring", [f"{old}=5"]).prompts.stream_workers == 5
    tree = yaml.safe_load(dump_recipe(load_recipe("ring", [f"{new}=6"])))
    tree["prompts"]["encoders"] = tree["prompts"].pop("stream_workers")
    assert parse_recipe(tree, "x").prompts.stream_workers == 6
    file.write_text("method: {name: dmd}\nprompts: {encoders: 3, stream_workers: 3}\n")
    with pytest.raises(UserError, match=f"^{file}: {old}: it is called {new} now, which is given, too"):
        load_recipe(str(file))
    with pytest.raises(UserError, match=f"^--set {old}=0: {new}: "):
        load_recipe("ring", [f"{old}=0"])


def test_who_is_to_blame_is_named(tmp_path: Path) -> None:
    """The last override that did it, or else the file."""
    file = tmp_path / "r.yaml"
    for text, overrides, words in (
        ("method: {nam: dmd}", ["seed=1", "batch.size=4"], f"{file}: unknown key 'method.nam'"),
        ("method: phased", ["seed=1"], f"{file}: 'method' is a section, not a value (got 'phased'); its keys: name, "),
        ("batch: {size: 8}", ["seed=1", "batch.micro=3"], "--set batch.micro=3: batch.micro (3) must divide"),
        ("batch: {micro: 8}", ["batch.size=4", "batch.size=6"], "--set batch.size=6: batch.micro (8) must divide"),
        ("seed: 1", ["method={nam: dmd}", "seed=2"], "--set method={nam: dmd}: unknown key 'method.nam'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            load_recipe(str(file), overrides)
        assert str(caught.value).startswith(words), caught.value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key.path=value"),
        ("=3", "key.path=value"),
        ("batch.size=[1", "not readable as YAML"),
        ("seed.low=1", "'seed' is a value, not a section"),
        ("method.name.x=1", "'name' is a value, not a section"),
    ],
)
def test_an_override_that_cannot_be_read(override: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("seed: 3\nmethod: {name: dmd}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(file), [override])
    assert words in str(caught.value) and f"--set {override}" in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_are_yaml_and_reach_into_sections() -> None:
    recipe = load_recipe(
        "ring",
        [
            "batch.micro=null", "batch.size=12", "method.experts.kind=lora", "optimizer.fake.betas=[0.1, 0.9]",
            "iterations=[3, 5]", "teacher.options.width=16", "monitor.tensorboard=false",
            "optimizer.generator.clip=null", "runtime.teacher.labels={ray.io/market-type: spot}",
        ],
    )  # fmt: skip
    assert recipe.batch.size == 12 and recipe.batch.micro is None and recipe.batch.micros == 1
    assert recipe.method.experts.kind == "lora" and recipe.method.experts.rank == 64
    assert recipe.optimizer.fake.betas == (0.1, 0.9) and recipe.optimizer.fake.lr == 1e-3
    assert recipe.optimizer.generator.clip is None and recipe.optimizer.generator.lr == 5e-4
    assert recipe.iterations == [3, 5] and recipe.teacher.options == {"width": 16}
    assert recipe.monitor.tensorboard is False
    assert recipe.runtime.teacher.labels == {"ray.io/market-type": "spot"}
    later = load_recipe("ring", ["seed=1", "seed=2"])
    assert later.seed == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not readable as YAML"),
        ("- 1\n- 2\n", "not a list"),
        ("just words", "not a str"),
        ("seed: 1\n1: 2\n", "1: Keys should be strings"),
        ("method:\n  naem: dmd\n", "unknown key 'method.naem'; did you mean 'name'?"),
        ("seed: 1\n", "method.name: it is missing; one of dmd, dmd-fewstep, dmd-sgts, phased"),
        ("method: {steps: 2}\n", "method.name: it is missing; one of dmd, "),
    ],
)
def test_a_file_that_is_no_recipe(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(file))
    assert words in str(caught.value) and "broken.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"bytes\.yaml") as caught:
        load_recipe(str(tmp_path / "bytes.yaml"))
    assert "\n" not in str(caught.value)


def test_a_recipe_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: {name: dmd}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).name == "mine"
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="empty.yaml: nothing in it"):  # as a full disk leaves one
        load_recipe(str(tmp_path / "empty.yaml"))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_whole(name: str, tmp_path: Path) -> None:
    path = shipped_recipes()[name]
    recipe = load_recipe(name)
    assert recipe.name == name == path.stem
    assert sum(plan_iterations(recipe, plan_phases(recipe))) > 0
    assert path.read_text().startswith("# ")  # what `raydmd recipes` shows
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert dump_recipe(load_recipe(str(tmp_path / "again.yaml"))) == dump_recipe(recipe)


def test_what_was_set_survives_a_round_trip() -> None:
    recipe = load_recipe("digits", ["iterations=[3, 4]", "method.clamp=null", "optimizer.fake.lr=3e-7"])
    tree = yaml.safe_load(dump_recipe(recipe))
    assert tree["iterations"] == [3, 4] and tree["method"]["clamp"] is None
    assert parse_recipe(tree, "there and back") == recipe != load_recipe("digits")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def keys(section: type[BaseModel]) -> list[str]:
    found: list[str] = []
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind)
        else:
            found.append(name)
    return found


def test_every_key_is_read_by_someone() -> None:
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "config.py")
    unread = [key for key in dict.fromkeys(keys(Recipe)) if not re.search(rf"\.{key}\b", sources)]
    assert unread == []
