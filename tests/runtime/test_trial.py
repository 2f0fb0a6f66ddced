"""Each role's worker tries its network on one row before training: what does not fit is a line, at once."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console
from test_families_diffusers import SHAPES, rows
from test_teacher_folders import new

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.errors import RunError, UserError
from raydmd.methods.loading import load_recipe
from raydmd.models.base import Denoiser
from raydmd.runs.run import recipe_family
from raydmd.runtime.cluster import join_or_start
from raydmd.runtime.launch import distill
from raydmd.runtime.workers.base import make_part
from raydmd.training.fake_score import Fake
from raydmd.training.generator import Generator
from raydmd.training.teacher import Scorer
from raydmd.training.trial import try_row

KINDS = {"generator": Generator, "fake": Fake, "teacher": Scorer}


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return new(tmp_path_factory.mktemp("trial") / "wan", "wan")


def recipe_for(wan: Path, *overrides: str):
    options = f"{{latent_shape: {SHAPES['wan']}}}"
    return load_recipe("ring", ["teacher.family=wan", f"teacher.path={wan}", f"teacher.options={options}", *overrides])


def row_of(family, **changes) -> dict[str, torch.Tensor]:
    columns = {name: value[:1] for name, value in rows().items() if name in family.condition_columns}
    return {name: value for name, value in {**family.conditions(columns), **changes}.items() if value is not None}


@pytest.mark.parametrize("role", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_row_that_fits_changes_nothing(wan: Path, role: str, lora: bool) -> None:
    recipe = recipe_for(wan, f"method.experts.kind={'lora' if lora else 'full'}", "method.experts.rank=2")
    part = make_part(KINDS[role], recipe, "cpu")
    before = copy.deepcopy(vars(part)["network" if role == "teacher" else "teacher"].state_dict())
    state = torch.get_rng_state()
    try_row(part, role, row_of(part.family))
    assert torch.equal(torch.get_rng_state(), state)
    after = vars(part)["network" if role == "teacher" else "teacher"].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("role", KINDS)
def test_a_row_that_the_network_does_not_take_is_a_line(wan: Path, role: str) -> None:
    part = make_part(KINDS[role], recipe_for(wan), "cpu")
    with pytest.raises(RunError, match=f"^{role}: its network does not take a row of the prompts: ") as error:
        try_row(part, role, row_of(part.family, prompt_embeds=torch.zeros(1, 7, 5)))
    assert "\n" not in str(error.value)


def test_only_the_teacher_needs_the_null_prompt_and_only_with_guidance(wan: Path) -> None:
    for scale, raises in ((3.0, True), (1.0, False)):
        for role, kind in KINDS.items():
            part = make_part(kind, recipe_for(wan, f"teacher.guidance_scale={scale}"), "cpu")
            row = row_of(part.family, negative_prompt_embeds=None)
            if raises and role == "teacher":
                with pytest.raises(UserError, match="guidance needs the null prompt"):
                    try_row(part, role, row)
            else:
                try_row(part, role, row)


class Wrong(Denoiser):
    """A network that gives one channel less than it takes."""

    def forward(self, x, t, conditions):
        return x[:, 1:]


def test_another_shape_is_refused(quick) -> None:
    recipe = quick("ring")
    family = recipe_family(recipe)
    with pytest.raises(RunError, match=r"teacher: its network gives \[1\] for latents of \[2\]"):
        try_row(Scorer(recipe, family, Wrong()), "teacher", {})
    try_row(object(), "teacher", {})  # a part of somebody's own


def counting(place: str, misfit: bool):
    """Return what fails to build a part, as where a node lacks the teacher, or builds one that does not fit.

    Nothing in it is of this module, which workers cannot import.
    """

    def build(recipe, device):
        marks = Path(place)
        (marks / f"start-{len(list(marks.iterdir()))}").touch()
        if misfit:
            raise UserError("teacher.path: no folder '/mnt/models'")
        part = make_part(Scorer, recipe, device)
        part.network.forward = lambda x, t, conditions: x[:, 1:]
        return part

    return build


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    join_or_start(4, 100)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("misfit", "kind", "words"),
    [(True, UserError, "^teacher.path: no folder '/mnt/models'$"), (False, RunError, "^teacher: its network gives")],
)
def test_a_worker_that_does_not_fit_ends_the_run_at_its_first_start(
    misfit, kind, words, small_ray, quick, tmp_path: Path
) -> None:
    (marks := tmp_path / "marks").mkdir()
    parts = {"teacher": counting(str(marks), misfit)}
    with pytest.raises(kind, match=words):
        distill(quick("ring"), tmp_path / "run", console=Console(quiet=True), parts=parts)
    assert len(list(marks.iterdir())) == 1  # it is not started again and again
