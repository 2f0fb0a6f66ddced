"""`raydmd recipes NAME --explain KEY` answers for every key, from the sections' own fields."""

import re
from typing import Any

import pytest

from raydmd.cli import run as command
from raydmd.config.comments import comment_beside
from raydmd.config.recipe import MethodOptions, Recipe, shipped_recipes
from raydmd.methods.explaining import all_keys, description, explain_in
from raydmd.methods.loading import load_recipe
from raydmd.methods.registry import METHODS
from raydmd.models.registry import FAMILIES


@pytest.mark.parametrize("name", ["digits", "sdxl-t2i-dmdx", "wan2.2-i2v-phased", "cifar10-class-dmd", "digits-dmd2"])
def test_every_key_is_explained(name: str) -> None:
    recipe, text = load_recipe(name), shipped_recipes()[name].read_text()
    keys = all_keys(recipe)
    assert {"method", "method.experts.rank", "runtime.generator.gpus", "optimizer.fake.lr"} <= set(keys)
    for key in keys:
        found = explain_in(recipe, text, key)
        assert len(found.description) > 4 and found.kind, key
        assert (found.value is None) == found.kind.startswith("a section"), key


def test_every_method_and_family_says_what_its_own_keys_mean() -> None:
    def described(section: type[Any], where: str) -> None:
        assert section.__doc__, where
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                described(inner, f"{where}.{name}")
            else:
                assert description(section, name), f"{where}.{name}"

    described(Recipe, "recipe")
    for name, method in METHODS.items():
        assert issubclass(method.options_type, MethodOptions)
        described(method.options_type, name)
    for name, family in FAMILIES.items():
        assert not [option for option in family.defaults if not family.meaning(option)], name


def explained(capsys: Any, *words: str) -> list[str]:
    assert command(["recipes", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_a_key_its_type_its_default_its_value_and_whose_it_is(capsys: Any) -> None:
    assert explained(capsys, "wan2.1-t2i-phased", "--explain", "optimizer.fake.lr") == [
        "optimizer.fake.lr: learning rate", "  takes    number above 0", "  default  0.001",
        "  here     4.0e-07 (appendix C)",
    ]  # fmt: skip
    lines = explained(capsys, "sdxl-t2i-dmdx", "--explain", "method.adp.pixel_weight")
    assert lines[-2:] == ["  default  0.0", "  here     0.15 (lambda_2)"]
    lines = explained(capsys, "sd3-t2i-adm", "--explain", "method.adm")
    assert lines[1].startswith("  takes    a section; its keys: dt,")
    lines = explained(capsys, "wan2.1-t2i-phased", "--set", "method.steps=8", "--explain", "method.steps")
    assert lines[-1] == "  here     8"  # whose comment in the file is another value's


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("wan2.1-t2i-phased --explain method.stpes", "unknown key 'method.stpes'; did you mean 'method.steps'?"),
        ("wan2.1-t2i-phased --explain rank", "unknown key 'rank'; did you mean 'method.experts.rank'?"),
        ("wan2.1-t2i-phased --explain teacher.options.dtipe", "did you mean 'dtype'?"),
        ("wan2.1-t2i-phased --explain method.name.x", "unknown key 'method.name.x'"),
        ("wan2.1-t2i-fased --explain name", "no recipe 'wan2.1-t2i-fased': .*; did you mean 'wan2.1-t2i-phased'?"),
        ("--explain name", "--explain, --set: of which recipe"),
    ],
)
def test_an_unknown_key_or_recipe_gets_one_line(words: str, said: str, capsys: Any) -> None:
    assert command(["recipes", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said.replace("?", r"\?"), err), err


def test_the_list_is_by_family(capsys: Any) -> None:
    lines, family, found = explained(capsys), "", {}
    for line in lines:
        if line.startswith("  "):
            found[line.split()[0]] = family
            assert len(line.split()) > 4  # a word about each
        else:
            family = line
    assert set(found) == set(shipped_recipes())
    assert {name: load_recipe(name).teacher.family for name in found} == found


def test_comments() -> None:
    text = "a: 1 # one\nb: # both\n  c: {d: 2, e: 3} # three\n  f: 4\ng: 'x # y'\n"
    beside = {key: comment_beside(text, key.split(".")) for key in ("a", "b", "b.c", "b.c.d", "b.f", "g", "h", "a.x")}
    assert beside == {"a": "one", "b": "both", "b.c": "three", "b.c.d": "three", "b.f": None, "g": None, "h": None,
                      "a.x": None}  # fmt: skip
