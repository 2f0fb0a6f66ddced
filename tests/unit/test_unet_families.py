"""Stable Diffusion 1, 2 and XL: what is their own among the families, held against diffusers' pipelines."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from test_every_family import inputs, recipe_of

from raydmd.data.prompts import PromptTable
from raydmd.diffusion.schedule import VariancePreserving
from raydmd.diffusion.solvers import euler_step
from raydmd.errors import UserError
from raydmd.methods.local import train
from raydmd.models.adapter_files import METADATA_KEY, Adapter, read_adapter
from raydmd.models.base import Family
from raydmd.models.diffusers.unet import UNetDenoiser
from raydmd.models.experts import Experts
from raydmd.models.features import chosen_blocks, read_features
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.clip_encoders import TOKENS, put_clip
from raydmd.models.tiny.sdxl import POOLED, SIZE, WIDTH
from raydmd.models.tiny.stable_diffusion import BETAS
from raydmd.objectives.distribution_matching import distribution_matching_gradient
from raydmd.runs.run import recipe_family
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

NAMES = ("sdxl", "stable_diffusion")
PARTS = ("vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "safety_checker",
         "feature_extractor")  # fmt: skip
PIPELINES: dict[str, Any] = {"sdxl": StableDiffusionXLPipeline, "stable_diffusion": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: TINY_MODELS[name].save(tmp_path_factory.mktemp(name)) for name in NAMES}


def family_of(name: str, folder: Path, **options: Any) -> Family:
    return TINY_MODELS[name].build(folder, **options)


SCHEDULERS: dict[str, Any] = {
    "ddim, leading": DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    "ddim, trailing": DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
    "ddim, as the pipeline mends it": DDIMScheduler(**BETAS),  # an offset of 0, and clipping
    "pndm": PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "euler, v": EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing"),
    "euler, evenly": EulerDiscreteScheduler(**BETAS),
    "dpm": DPMSolverMultistepScheduler(**BETAS),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_first_step_is_the_pipelines_with_any_scheduler(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny, steps = TINY_MODELS["stable_diffusion"], 4
    for part in ("unet", "vae"):
        (tmp_path / part).symlink_to(folders["stable_diffusion"] / part)
    SCHEDULERS[name].save_pretrained(tmp_path / "scheduler")
    rows, recipe = tiny.rows(2), recipe_of(tiny, tmp_path)
    family = recipe_family(recipe)
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    wanted = tiny.first_step(tmp_path, rows, noise, 3.0, steps)
    assert wanted is not None
    t, t_next = family.teacher_times(steps)[:2]
    scorer = Scorer(recipe, family, family.load_teacher())
    prediction = scorer.predict(noise, torch.full((2,), t, dtype=torch.float64), family.conditions(rows))
    made = euler_step(family.schedule, prediction, noise, t, t_next, family.prediction)
    assert (made - wanted).abs().max() <= 1e-5
    off = euler_step(family.schedule, prediction, noise, t, t_next - 1e-3, family.prediction)
    assert (off - wanted).abs().max() > 1e-4
    assert family.prediction == ("v" if name.endswith(" v") else "eps")


def test_a_pictures_size_is_given_height_first(folders: dict[str, Path]) -> None:
    family = family_of("sdxl", folders["sdxl"])
    teacher: Any = family.load_teacher()
    x, t, conditions = inputs(TINY_MODELS["sdxl"], family)
    added = teacher.added(x, conditions)
    assert added["time_ids"].tolist() == [[32.0, 48.0, 0.0, 0.0, 32.0, 48.0]] * 3
    given = PIPELINES["sdxl"]._get_add_time_ids
    pipeline = type("Parts", (), {"unet": teacher.unet})
    right, wrong = (given(pipeline, s, (0, 0), s, torch.float32, POOLED) for s in ((32, 48), (48, 32)))
    assert torch.equal(added["time_ids"][:1], right) and not torch.equal(added["time_ids"][:1], wrong)
    other = teacher(torch.randn(3, 4, 8, 6), t, conditions)
    assert other.shape == (3, 4, 8, 6)  # of another size than `latent_shape`


def test_prompts_are_encoded_by_the_pipeline(tmp_path: Path) -> None:
    """The null prompt is zeros where the pipeline has it so, and the encoders' of the empty text where not."""
    tiny, texts = TINY_MODELS["sdxl"], ["a fox", "snow"]
    folder = tiny.save(tmp_path)
    put_clip(folder, 6, (WIDTH - 6, POOLED))
    rows = family_of("sdxl", folder).encode_prompts(texts)
    whole = PIPELINES["sdxl"].from_pretrained(folder, unet=None, vae=None, scheduler=None)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def pipelines(**given: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(zip(names, whole.encode_prompt(texts, **given), strict=True))

    assert whole.config.force_zeros_for_empty_prompt
    wanted, empty = pipelines(), pipelines(negative_prompt="")
    assert rows.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(torch.from_numpy(rows[key]), value, atol=1e-6), key
    assert not rows["negative_prompt_embeds"].any() and rows["prompt_embeds"].shape == (2, TOKENS, WIDTH)
    assert empty["negative_prompt_embeds"].abs().max() > 0.1
    said = family_of("sdxl", folder, negative_prompt="blurred").encode_prompts(texts)
    for key, value in pipelines(negative_prompt="blurred").items():
        assert torch.allclose(torch.from_numpy(said[key]), value, atol=1e-6), key
    put_clip(folder, 6, (WIDTH - 6, POOLED), force_zeros_for_empty_prompt=False)
    encoded = family_of("sdxl", folder).encode_prompts(texts)
    for key, value in empty.items():
        assert torch.allclose(torch.from_numpy(encoded[key]), value, atol=1e-6), key
    family = family_of("sdxl", folder)
    family.check_teacher()
    family.check_conditions(family.conditions(rows))


def test_prompts_of_the_first_stable_diffusion(tmp_path: Path) -> None:
    tiny, texts = TINY_MODELS["stable_diffusion"], ["a fox", "snow"]
    folder = tiny.save(tmp_path)
    put_clip(folder, WIDTH)
    rows = family_of("stable_diffusion", folder).encode_prompts(texts)
    parts = dict(unet=None, vae=None, scheduler=None, safety_checker=None, feature_extractor=None)
    whole = PIPELINES["stable_diffusion"].from_pretrained(folder, requires_safety_checker=False, **parts)
    with torch.no_grad():
        wanted, null = whole.encode_prompt(texts, "cpu", 1, True)
    assert torch.allclose(torch.from_numpy(rows["prompt_embeds"]), wanted, atol=1e-6)
    assert torch.allclose(torch.from_numpy(rows["negative_prompt_embeds"]), null, atol=1e-6)
    assert not torch.allclose(wanted, null, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_what_we_trained(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Names and metadata begin with ``unet``: diffusers cannot load what begins otherwise."""
    family = family_of(name, folders[name])
    teacher: Any = family.load_teacher()
    batch = inputs(TINY_MODELS[name], family)
    experts = Experts(teacher, 1, "lora", 4, 0.5, family.lora_targets, 0)
    experts.start(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        state, said = experts.state(0), experts.metadata(0)
        ours, without = experts.expert(0)(*batch), teacher(*batch)
    assert all(key.startswith("unet.") for key in state)
    assert set(json.loads(said[METADATA_KEY])) == {"unet.r", "unet.lora_alpha", "unet.target_modules"}
    wrong = {**said, METADATA_KEY: said[METADATA_KEY].replace("unet.", "transformer.")}
    for label, metadata in (("right", said), ("wrong", wrong), ("silent", None)):
        file = tmp_path / label / "model.safetensors"
        file.parent.mkdir()
        save_file(state, file, metadata)
        assert read_adapter(file) == (None if label == "silent" else Adapter(4, 0.5))
        unet = UNet2DConditionModel.from_pretrained(folders[name] / "unet")
        parts = {part: None for part in PARTS if part in inspect.signature(PIPELINES[name]).parameters}
        pipeline = PIPELINES[name](unet=unet, **parts)
        if label == "wrong":
            with pytest.raises(KeyError, match="model_type"):  # it reads a configuration with nothing in it
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
            continue
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        with torch.no_grad():
            made = type(teacher)(unet, family.schedule, *([8] if name == "sdxl" else []))(*batch)
        distance = (made - ours).norm() / (ours - without).norm()
        assert distance < 1e-4 if label == "right" else distance > 1  # silent: eight times too strong


@pytest.mark.parametrize("name", NAMES)
def test_features_of_the_blocks(name: str, folders: dict[str, Path]) -> None:
    family = family_of(name, folders[name])
    teacher: Any = family.load_teacher()
    x, t, conditions = inputs(TINY_MODELS[name], family)
    names = chosen_blocks(teacher, None, "blocks")
    assert names == ["down_blocks.0", "down_blocks.1", "mid_block"]
    prediction, features = read_features(teacher, names, x, t, conditions)
    assert torch.equal(prediction, teacher(x, t, conditions))
    shapes = [tuple(each.shape[1:]) for each in features]
    assert shapes == [teacher.block_shape(each, family.latent_shape) for each in names]
    assert shapes == [(8, 2, 3), (16, 2, 3), (16, 2, 3)]
    assert not torch.equal(features[1], features[2])
    seen: list[torch.Tensor] = []
    handle = teacher.unet.up_blocks[0].register_forward_pre_hook(
        lambda module, given, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    teacher(x, t, conditions)
    handle.remove()
    assert torch.equal(features[-1], seen[0])  # what the decoder is given


def test_shapes_of_the_real_ones() -> None:
    """By the real configs' channels: DMD2 reads 1280 of SDXL at a 32nd of the picture's sides."""
    for name, channels, shape in (("sdxl", (320, 640, 1280), (1280, 32, 32)),
                                  ("stable_diffusion", (320, 640, 1280, 1280), (1280, 8, 8))):  # fmt: skip
        family = build_family(name)
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=channels, down_block_types=("DownBlock2D",) * len(channels), layers_per_block=1,
                up_block_types=("UpBlock2D",) * len(channels), mid_block_type="UNetMidBlock2D",
            )  # fmt: skip
        denoiser = UNetDenoiser(unet, VariancePreserving.scaled_linear())
        assert denoiser.block_shape("mid_block", family.latent_shape) == shape
        sides = {"sdxl": 32, "stable_diffusion": 64}[name]
        assert family.shape_for(9 * sides, 7 * sides) == (4, 7 * sides // 8, 9 * sides // 8)
        with pytest.raises(UserError, match=f"sides that {sides} divides"):
            family.shape_for(9 * sides, 7 * sides + 8)


def test_sides_that_the_levels_do_not_divide_are_refused(folders: dict[str, Path]) -> None:
    for name in NAMES:
        family = family_of(name, folders[name])
        assert family.shape_for(64, 32) == (4, 4, 8)
        for size in ((64, 40), (72, 32), (60, 32)):
            with pytest.raises(UserError, match="sizes: .* is not of sides that 16 divides"):
                family.shape_for(*size)
        with pytest.raises(UserError, match=r"teacher.options.latent_shape: \[4, 5\] is not divisible by 2"):
            family_of(name, folders[name], latent_shape=[4, 4, 5]).check_teacher()


REFUSED = [
    ("sdxl", dict(in_channels=9), "takes 9 channels and gives 4"),
    ("sdxl", dict(time_cond_proj_dim=16), "guidance-distilled"),
    ("sdxl", dict(addition_embed_type="text"), "addition_embed_type text, not text_time"),
    ("stable_diffusion", dict(addition_embed_type="text_time"), "addition_embed_type text_time, not None"),
    ("stable_diffusion", dict(num_class_embeds=3), "num_class_embeds 3"),
    ("stable_diffusion", dict(mid_block_type=None), "no middle block"),
    ("stable_diffusion", dict(in_channels=8, out_channels=8), "takes 8 channels, not 4"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_another_unet_is_refused(
    name: str, change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[name] / "unet" / "config.json").read_text())
    needed = dict(addition_time_embed_dim=SIZE, projection_class_embeddings_input_dim=POOLED + 6 * SIZE)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, **needed, **change}))
    with pytest.raises(UserError, match=message) as error:
        family_of(name, tmp_path).check_teacher()
    assert "\n" not in str(error.value)


def test_prompts_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    family = family_of("sdxl", folders["sdxl"])
    family.check_teacher()
    rows = TINY_MODELS["sdxl"].rows(2)
    pooled = {**rows, **{key: rows[key][:, :-1] for key in rows if "pooled" in key}}
    with pytest.raises(UserError, match="'pooled_prompt_embeds' is of width 11, but the teacher takes 12"):
        family.check_conditions(family.conditions(pooled))
    with pytest.raises(UserError, match="'prompt_embeds' needs 'pooled_prompt_embeds'"):
        family.conditions({key: rows[key] for key in rows if "pooled" not in key})


def test_the_gradient_is_finite_where_little_signal_is_left(folders: dict[str, Path]) -> None:
    """Where alpha is .07, x_0 of a predicted eps is 15 times as far off; weighted by its own size it is not."""
    for name in NAMES:
        family = family_of(name, folders[name])
        teacher = family.load_teacher()
        x_s, _, conditions = inputs(TINY_MODELS[name], family)
        t = torch.full((3,), family.schedule.t_max, dtype=torch.float64)
        x_t = family.schedule.diffuse(x_s, torch.randn(x_s.shape, generator=torch.Generator().manual_seed(2)), t)
        with torch.no_grad():
            real, fake = teacher(x_t, t, conditions), teacher(x_t, t, family.unconditional(conditions))
        for weight in ("normalized", "raw", "sigma_over_alpha", "sigma_cubed_over_alpha"):
            gradient, broken = distribution_matching_gradient(
                family.schedule, x_s, x_t, real, fake, t, 0.0, family.prediction, weight
            )
            assert not broken.any() and gradient.abs().max() < 1e3 and gradient.any()


def test_methods_on_a_variance_preserving_process(folders: dict[str, Path]) -> None:
    """ADM, whose discriminator reads the teacher's UNet and whose teacher and fake score make steps of their ODE."""
    name, folder = "sdxl", folders["sdxl"]
    tiny = TINY_MODELS[name]
    recipe = recipe_of(tiny, folder, "method.name=adm", "teacher.steps=2", "iterations=1")
    family = recipe_family(recipe)
    prompts = PromptTable(str(recipe.prompts.path), family.condition_columns)
    one = train(recipe, family, family.load_teacher(), prompts)
    for expert in one.experts:
        assert all(value.isfinite().all() for value in expert.values())
        assert any(value.any() for key, value in expert.items() if key.endswith("lora_B.weight"))
    preview = one.parts["teacher"].preview(1, family.conditions(prompts.rows(0, 1)))
    assert preview.shape == (1, 3, 32, 48) and preview.isfinite().all()
    pairs = one.parts["teacher"].pairs(0, 1, family.conditions(prompts.rows(0, 1)))
    assert torch.allclose(pairs.noise.std(), family.schedule.sigma(1.0).float(), rtol=0.2)
