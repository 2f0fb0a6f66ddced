"""Experts that start from an existing student: a run's, one of its experts, full weights, LoRA files."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from run_folders import make_run
from safetensors.torch import load_file, save_file
from test_teacher_lora import folders as folders

from raydmd.errors import UserError
from raydmd.methods.local import train
from raydmd.methods.registry import plan_phases
from raydmd.models.experts import Experts
from raydmd.models.initial_student import check_initial, initial_state
from raydmd.models.tiny import TINY_MODELS
from raydmd.recipe_check import absolute, check
from raydmd.runs.folders import expert_file
from raydmd.runs.run import recipe_family
from raydmd.training.generator import Generator

LORA = ["method.experts.kind=lora", "method.experts.rank=4"]


@pytest.fixture(scope="module")
def runs(quick: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for kind, more in (("full", []), ("lora", LORA)):
        make_run(quick("ring", "optimizer.generator.lr=0.01", *more), root / kind, prompts("ring"))
    return {kind: root / kind for kind in ("full", "lora")}


def started(recipe: Any, index: int) -> dict[str, torch.Tensor]:
    """Return an expert's weights as its phase begins."""
    family = recipe_family(recipe)
    generator = Generator(recipe, family, family.load_teacher(), plan_phases(recipe))
    for phase in range(index + 1):
        generator.start_phase(phase, 0)
    assert torch.equal(generator.flat.average, generator.flat.weight)
    return generator.experts.state(index)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_experts_start_from_a_runs_own(quick: Any, runs: dict[str, Path], kind: str) -> None:
    more, run = (LORA if kind == "lora" else []), runs[kind]
    files = [load_file(expert_file(run, index)) for index in range(2)]
    assert not same(*files)
    whole = quick("ring", *more, f"method.init={run}")
    one = quick("ring", *more, f"method.init={run}/experts/phase-1")
    assert check(whole) == check(one) == []
    for index in range(2):
        assert same(started(whole, index), files[index]) and same(started(one, index), files[0])
        assert not same(started(quick("ring", *more), index), files[index])


def test_training_goes_on_from_it(quick: Any, prompts: Any, runs: dict[str, Path]) -> None:
    recipe = quick("ring", f"method.init={runs['full']}", "optimizer.generator.lr=1e-6")
    family = recipe_family(recipe)
    experts = train(recipe, family, family.load_teacher(), prompts("ring")).experts
    teacher = family.load_teacher().state_dict()
    for index, expert in enumerate(experts):
        before = load_file(expert_file(runs["full"], index))
        moved = max(float((expert[name] - before[name]).abs().max()) for name in expert)
        assert 0 < moved < 1e-4 < max(float((expert[name] - teacher[name]).abs().max()) for name in expert)


def test_a_diffusers_models_own_files(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Full weights as `save_pretrained` writes them, and a LoRA as `save_lora_weights` does."""
    family = TINY_MODELS["wan"].build(folders["wan"])
    tuned = diffusers.WanTransformer3DModel.from_pretrained(folders["wan"] / "transformer")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "full")
    outline = family.outline()
    check_initial(str(tmp_path / "full"), 2, outline, "full", 4, 8.0, family.lora_targets)
    experts = Experts(family.load_teacher(), 2, "full")
    experts.start(1)
    experts.load_state(1, initial_state(str(tmp_path / "full"), 1, 2, experts.names(1)))
    assert same(experts.expert(1).network.state_dict(), tuned.state_dict())  # type: ignore[attr-defined]
    adapters = Experts(family.load_teacher(), 1, "lora", 4, 8.0, family.lora_targets)
    adapters.start(0)
    state = {name.removeprefix("transformer."): value + 0.1 for name, value in adapters.state(0).items()}
    diffusers.WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    check_initial(str(tmp_path / "lora"), 1, outline, "lora", 4, 8.0, family.lora_targets)
    found = initial_state(str(tmp_path / "lora"), 0, 1, adapters.names(0))
    assert same({name.removeprefix("transformer."): value for name, value in found.items()}, state)


@pytest.mark.parametrize(
    ("init", "more", "words"),
    [
        ("full", LORA, ["full/experts/phase-1/model.safetensors has", "it is for method.experts.kind: full"]),
        ("lora", [], ["it is for method.experts.kind: lora"]),
        ("lora", [LORA[0], "method.experts.rank=8"], ["have rank 4 and alpha 8, but method.experts has rank 8"]),
        ("lora", [*LORA, "method.experts.alpha=2"], ["rank 4 and alpha 8, but method.experts has rank 4 and alpha 2"]),
        ("full", ["method.phases=1"], ["has 2 trained experts, and the recipe's method 1", "full/experts/phase-2"]),
        ("ful", [], ["no file or folder", "did you mean 'full'?"]),
        (".", [], ["is no run with trained experts, and has none of model.safetensors"]),
        ("short", [], ["lacks 1 of the experts'"]),
        ("shape", [], ["in the experts"]),
        ("text", [], ["is not a safetensors file"]),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(
    quick: Any, runs: dict[str, Path], tmp_path: Path, init: str, more: list[str], words: list[str]
) -> None:
    root = runs["full"].parent
    state = load_file(expert_file(runs["full"], 0))
    name = next(name for name, value in state.items() if value.ndim == 2)
    if init in ("short", "shape", "text"):
        path = tmp_path / "student.safetensors"
        other = {init: torch.ones(1)} if init == "text" else {**state, name: state[name][:, :-1].contiguous()}
        if init == "short":
            del other[name]
        save_file(other, path)
        if init == "text":
            path.write_text("weights")
    else:
        path = root / init
    with pytest.raises(UserError) as caught:
        check(quick("ring", *more, f"method.init={path}"))
    told = str(caught.value)
    assert told.startswith("method.init: ") and "\n" not in told and all(each in told for each in words), told


def test_a_place_is_made_absolute_and_what_is_not_finite_is_refused(
    quick: Any, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs["full"].parent)
    assert absolute(quick("ring", "method.init=full")).method.init == str(runs["full"])
    folder = shutil.copytree(runs["full"], tmp_path / "spoilt")
    state = load_file(expert_file(folder, 1))
    name = next(iter(state))
    state[name].view(-1)[0] = torch.nan
    save_file(state, expert_file(folder, 1))
    with pytest.raises(UserError, match=f"method.init: .*phase-2/model.safetensors: '{name}' has values"):
        started(quick("ring", f"method.init={folder}"), 1)
