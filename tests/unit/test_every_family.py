"""What holds of every family: tried on a tiny random model of diffusers' own classes, and held against its pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.diffusion.solvers import euler_step
from raydmd.diffusion.times import step_grid
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.models.base import Conditions, Family
from raydmd.models.experts import Experts
from raydmd.models.tiny import TINY_MODELS, TinyModel
from raydmd.runs.run import recipe_family
from raydmd.sampling.student import sample_student
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

STEPS = 4
PIPELINED = [name for name, tiny in TINY_MODELS.items() if type(tiny).first_step is not TinyModel.first_step]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save(tmp_path_factory.mktemp(name)) for name, tiny in TINY_MODELS.items()}


def inputs(tiny: TinyModel, family: Family, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    x = torch.randn(count, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    t = family.schedule.t_max * torch.tensor([0.2, 0.55, 0.9], dtype=torch.float64)[:count]
    return x, t, family.conditions(tiny.rows(count))


def moved(a: torch.Tensor, b: torch.Tensor, least: float = 1e-4) -> bool:
    return bool(((a - b).flatten(1).abs().amax(1) > least).all())


def recipe_of(tiny: TinyModel, folder: Path, *overrides: str):
    rows = tiny.rows(6)
    if not (folder / "prompts.parquet").is_file():
        write_prompts(folder / "prompts.parquet", rows)
    (folder / "tiny.yaml").write_text(
        f"""
iterations: 2
teacher: {{family: {tiny.family}, path: {folder}, guidance_scale: 3.0, options: {dict(tiny.options)}}}
prompts: {{path: {folder}/prompts.parquet}}
method: {{name: phased, fake_updates: 1, experts: {{kind: lora, rank: 4, alpha: 8}}}}
optimizer: {{generator: {{lr: 1.0e-3}}, fake: {{lr: 1.0e-4}}}}
batch: {{size: 4, micro: 2}}
monitor: {{samples_every: 0, tensorboard: false}}
"""
    )
    return load_recipe(str(folder / "tiny.yaml"), list(overrides))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_shape_dtype_and_what_it_depends_on(name: str, folders: dict[str, Path]) -> None:
    tiny = TINY_MODELS[name]
    family = tiny.build(folders[name])
    teacher = family.load_teacher()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    x, t, conditions = inputs(tiny, family)
    y = teacher(x, t, conditions)
    assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all()
    assert moved(teacher(x + 0.1, t, conditions), y)
    assert moved(teacher(x, t + 0.05 * family.schedule.t_max, conditions), y)
    others = family.conditions(tiny.rows(3, seed=1))
    for column in [column for column in conditions if not column.startswith("negative_")]:
        if not torch.equal(others[column], conditions[column]):
            assert moved(teacher(x, t, {**conditions, column: others[column]}), y, 1e-6), column
    alone = teacher(x[1:2], t[1:2], {key: value[1:2] for key, value in conditions.items()})
    assert torch.allclose(alone, y[1:2], atol=1e-5) and not torch.allclose(alone, y[2:3], atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", PIPELINED)
def test_the_first_step_is_the_pipelines(name: str, guidance_scale: float, folders: dict[str, Path]) -> None:
    """Times, packing, conditions, prediction, guidance and its rescaling at once; with one of them wrong it is not."""
    tiny, folder = TINY_MODELS[name], folders[name]
    rows, recipe = tiny.rows(2), recipe_of(tiny, folder)
    family = recipe_family(recipe)
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    wanted = tiny.first_step(folder, rows, noise, guidance_scale, STEPS)
    assert wanted is not None and moved(wanted, noise, 1e-2)
    scorer, conditions = Scorer(recipe, family, family.load_teacher()), family.conditions(rows)

    def step(t: float, t_next: float, scale: float) -> torch.Tensor:
        prediction = scorer.predict(noise, torch.full((2,), t, dtype=torch.float64), conditions, scale)
        return euler_step(family.schedule, prediction, noise, t, t_next, family.prediction)

    t, t_next = family.teacher_times(STEPS)[:2]
    assert (step(t, t_next, guidance_scale) - wanted).abs().max() <= 1e-5
    assert moved(step(t, t_next, guidance_scale + 1.0), wanted, 1e-4)
    assert moved(step(t - 0.02 * t, t_next, guidance_scale), wanted, 1e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_null_prompt(name: str, folders: dict[str, Path]) -> None:
    tiny = TINY_MODELS[name]
    family = tiny.build(folders[name])
    teacher = family.load_teacher()
    x, t, conditions = inputs(tiny, family)
    null = family.unconditional(conditions)
    assert null.keys() == conditions.keys()
    assert all(null[key].shape == conditions[key].shape for key in null)  # so that both halves make one batch
    assert moved(teacher(x, t, null), teacher(x, t, conditions))
    without = {key: value for key, value in conditions.items() if not key.startswith("negative_")}
    assert torch.equal(teacher(x, t, without), teacher(x, t, conditions))
    if without.keys() != conditions.keys():
        with pytest.raises(UserError, match="guidance needs the null prompt in column 'negative_"):
            family.unconditional(without)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_lora_with_recomputed_activations(name: str, folders: dict[str, Path]) -> None:
    """The same gradients, though another expert is called between the forward pass and the backward pass."""
    tiny = TINY_MODELS[name]
    family = tiny.build(folders[name])
    plain, recomputed = (
        tiny.build(folders[name], gradient_checkpointing=on).load_teacher() for on in (False, True)
    )  # fmt: skip
    assert recomputed.checkpointing and not plain.checkpointing
    batch = inputs(tiny, family)

    def gradients(teacher) -> torch.Tensor:
        experts = Experts(teacher, 2, "lora", 4, 8.0, family.lora_targets, 0)
        for index in (0, 1):
            experts.start(index)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(index)
                for parameter in experts.trainable_parameters().values():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        loss = experts.expert(1)(*batch).square().sum()
        with torch.no_grad():
            experts.expert(0)(*batch)
        loss.backward()
        found = {n: p.grad for n, p in experts.trainable_parameters().items() if p.grad is not None}
        for target in family.lora_targets:
            assert any(f".{target}.lora_B.weight" in n for n in found), target
        return torch.cat([found[n].flatten() for n in sorted(found)])

    wanted = gradients(plain)
    assert wanted.abs().max() > 0
    assert (gradients(recomputed) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_vae_there_and_back(name: str, folders: dict[str, Path]) -> None:
    """Pixels are the VAE's own of latents at its scale; encoding undoes that scale."""
    tiny = TINY_MODELS[name]
    family = tiny.build(folders[name])
    x = 0.5 * inputs(tiny, family)[0]
    pixels, frames = family.to_pixels(x), family.decode_video(x)
    width, height = family.picture_size
    assert pixels.shape == (3, family.frames, 3, height, width)
    assert torch.allclose(frames, (pixels.clamp(-1, 1) + 1) / 2, atol=1e-6)
    assert torch.equal(family.decode(x), frames[:, frames.shape[1] // 2])
    if family.frames == 1:
        assert family.picture_shape == (3, height, width)
        latents = family.encode_pixels(pixels[:, 0].clamp(-1, 1))
        assert latents.shape == x.shape and latents.isfinite().all()
        assert not torch.allclose(latents, family.encode_pixels(-pixels[:, 0].clamp(-1, 1)), atol=1e-3)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_phased_iteration(name: str, folders: dict[str, Path]) -> None:
    tiny = TINY_MODELS[name]
    recipe = recipe_of(tiny, folders[name])
    family = recipe_family(recipe)
    prompts = PromptTable(str(recipe.prompts.path), family.condition_columns)
    one = train(recipe, family, family.load_teacher(), prompts)
    assert len(one.experts) == 2
    for expert in one.experts:
        assert all(value.isfinite().all() and value.dtype == torch.float32 for value in expert.values())
        assert any(value.any() for key, value in expert.items() if key.endswith("lora_B.weight"))
    kept, loaded = one.parts["teacher"].network.state_dict(), family.load_teacher().state_dict()
    assert all(torch.equal(loaded[key], kept[key]) for key in loaded)  # the frozen one is untouched
    generator = one.parts["generator"]
    conditions = family.conditions(prompts.take(np.arange(2)))
    made = sample_student(family, generator.experts, generator.phases, conditions, 2, seed=1)
    assert made.latents.shape == (2, *family.latent_shape) and made.latents.isfinite().all()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_half_precision_weights_take_and_give_float32(name: str, folders: dict[str, Path]) -> None:
    tiny = TINY_MODELS[name]
    family = tiny.build(folders[name], dtype="bfloat16")
    half, full = family.load_teacher(), tiny.build(folders[name]).load_teacher()
    assert torch.bfloat16 in {p.dtype for p in half.parameters()}
    x, t, conditions = inputs(tiny, family)
    y, reference = half(x, t, conditions), full(x, t, conditions)
    assert y.dtype == torch.float32
    assert 0 < (y - reference).norm() / reference.norm() < 0.05


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_given_shift_replaces_the_models_times(name: str, folders: dict[str, Path]) -> None:
    family = TINY_MODELS[name].build(folders[name])
    assert family.teacher_times(STEPS, 2.0) == step_grid(STEPS, 2.0, family.schedule.t_max)
    own = family.teacher_times(STEPS)
    assert own[-1] == 0.0 and len(own) == STEPS + 1 and sorted(own, reverse=True) == own
