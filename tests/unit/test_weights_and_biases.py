"""Weights & Biases: what is sent, what is not, and what is said where the package is missing."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.runtime.launch import distill
from raydmd.runtime.observability.weights_and_biases import WandbRun, check_wandb, is_wanted, shown_settings

WANTED = ["monitor.wandb.project=students", "monitor.wandb.mode=offline"]


class Missing:
    """An import finder for which there is no such package, but a folder of its name, as the package makes one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name == "wandb" else None


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])


def test_where_it_is_missing_the_extra_is_named_before_a_run(missing: None, quick: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^monitor\.wandb: the package wandb is not .*pip install 'raydmd\[wandb\]'"):
        distill(quick("ring", *WANTED), tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_nothing_is_wanted_without_a_project() -> None:
    for overrides in ([], ["monitor.wandb.mode=offline"], [WANTED[0], "monitor.wandb.mode=disabled"]):
        recipe = load_recipe("ring", overrides)
        assert not is_wanted(recipe)
        check_wandb(recipe)
    assert is_wanted(load_recipe("ring", WANTED))


def test_its_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"monitor\.wandb\.projekt'; did you mean 'project'"):
        load_recipe("ring", ["monitor.wandb.projekt=x"])
    with pytest.raises(UserError, match=r"monitor\.wandb\.mode: .*'online', 'offline' or 'disabled'"):
        load_recipe("ring", ["monitor.wandb.mode=on"])


def test_addresses_and_what_may_hold_credentials_are_not_sent() -> None:
    recipe = load_recipe("ring", ["checkpoint.path=s3://mine/runs", "plugins=[]", "seed=5", "iterations=[3, 4]"])
    sent = shown_settings(recipe.model_dump(mode="json"))
    assert "s3:" not in repr(sent) and "mine/runs" not in repr(sent) and sent["checkpoint"]["path"] == "(not sent)"
    assert sent["seed"] == 5 and sent["iterations"] == [3, 4] and sent["method"]["name"] == recipe.method.name
    assert shown_settings({"a": ["user@host", "plain"]}) == {"a": ["(not sent)", "plain"]}


def test_the_package_takes_what_is_sent(tmp_path: Path) -> None:
    said: list[str] = []
    run = WandbRun(load_recipe("ring", WANTED), tmp_path, said.append)
    run.figures(0, {"loss_fake": 1.0})
    run.figures(1, {"loss_fake": 0.5})
    run.figures(0, {"loss_fake": 7.0})  # made again
    run.picture("student", np.zeros((8, 8, 3), np.uint8), 1)
    assert run._run.summary["loss_fake"] == 0.5
    run.close()
    assert said == [] and list((tmp_path / "wandb").glob("offline-run-*"))
