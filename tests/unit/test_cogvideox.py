"""What the generic tests of families do not see of CogVideoX: 2b's and 1.5's structures, its schedulers, its VAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from safetensors.torch import load_file
from test_every_family import STEPS, moved, recipe_of

from raydmd.diffusion.solvers import euler_step
from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.diffusers.cogvideox import crop_region
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.cogvideox import TinyCogVideoX, TinyCogVideoX2b, TinyCogVideoX15
from raydmd.runs.run import recipe_family
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

TINY = TINY_MODELS["cogvideox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("cogvideox"))


@pytest.mark.parametrize("tiny", [TinyCogVideoX2b(), TinyCogVideoX15()], ids=lambda tiny: tiny.name)
def test_the_first_step_is_the_pipelines(tiny: TinyCogVideoX, tmp_path: Path) -> None:
    folder, rows = tiny.save(tmp_path), tiny.rows(2)
    recipe = recipe_of(tiny, folder)
    family = recipe_family(recipe)
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    scorer, conditions = Scorer(recipe, family, family.load_teacher()), family.conditions(rows)
    t, t_next = family.teacher_times(STEPS)[:2]
    prediction = scorer.predict(noise, torch.full((2,), t, dtype=torch.float64), conditions)
    made = euler_step(family.schedule, prediction, noise, t, t_next, family.prediction)
    wanted = tiny.first_step(folder, rows, noise, 3.0, STEPS)
    assert (made - wanted).abs().max() <= 1e-5 and moved(wanted, noise, 1e-2)
    assert moved(tiny.first_step(folder, rows, noise, 4.0, STEPS), made)
    assert family.load_teacher().feature_shape(family.latent_shape) == (
        32,
        3 if tiny.name == "cogvideox_2b" else 2,
        4,
        3,
    )


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_process_and_the_times_are_the_schedulers(kind: Callable[..., Any], spacing: str, tmp_path: Path) -> None:
    for steps, shift, zero in ((4, 3.0, True), (7, 1.0, True), (50, 1.0, False)):
        scheduler = kind(timestep_spacing=spacing, prediction_type="v_prediction", snr_shift_scale=shift,
                         rescale_betas_zero_snr=zero)  # fmt: skip
        scheduler.save_pretrained(tmp_path / "scheduler")
        family = TINY.build(tmp_path)
        at = torch.arange(1000, dtype=torch.float64)
        alphas = family.schedule.alpha(family.schedule.time_of(at))
        assert (alphas.square() - scheduler.alphas_cumprod).abs().max() <= 1e-9
        assert family.prediction == "v"
        scheduler.set_timesteps(steps)
        times = family.teacher_times(steps)
        found = family.schedule.timestep_of(torch.tensor(times[:-1], dtype=torch.float64))
        assert (found - scheduler.timesteps).abs().max() <= 1e-6 and times[-1] == 0.0
        other = kind(snr_shift_scale=2.0, rescale_betas_zero_snr=zero).alphas_cumprod
        assert (alphas.square() - other).abs().max() > 1e-3


def test_a_scheduler_that_is_silent_has_its_own_defaults(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "CogVideoXDDIMScheduler"}')
    family = TINY.build(tmp_path)
    alphas = family.schedule.alpha(family.schedule.time_of(torch.arange(1000)))
    assert (alphas.square() - CogVideoXDDIMScheduler().alphas_cumprod).abs().max() <= 1e-9
    assert family.prediction == "eps"


def test_the_region_of_other_sizes_is_diffusers() -> None:
    for grid in ((30, 45), (24, 42), (45, 30), (3, 9), (16, 16)):
        for own in ((30, 45), (48, 85)):
            assert crop_region(grid, own) == get_resize_crop_region_for_grid(grid, own[1], own[0])
    assert crop_region((24, 42), (30, 45)) != ((0, 0), (24, 42))


def test_frames_of_even_and_padded_latents(folder: Path, tmp_path: Path) -> None:
    """1.0's VAE makes 4 frames of each latent where their number is even; 1.5's first latent frame is padding."""
    for frames, wanted in ((1, 1), (2, 8), (3, 9)):
        family = TINY.build(folder, latent_shape=[4, frames, 8, 6])
        assert family.decode_video(torch.randn(1, *family.latent_shape)).shape == (1, wanted, 3, 64, 48)
        assert family.frames == wanted
    tiny = TinyCogVideoX15()
    padded = tiny.build(tiny.save(tmp_path))
    assert padded.frames == 9 and padded.patches == (2, 2, 2)
    x = torch.randn(1, *padded.latent_shape)
    assert padded.to_pixels(x).shape == padded.decode_video(x).shape == (1, 9, 3, 64, 48)
    assert torch.equal(padded.to_pixels(x), padded.to_pixels(torch.cat([x[:, :, :1] + 1, x[:, :, 1:]], dim=2)))


def test_the_vaes_scale_is_undone(folder: Path) -> None:
    family: Family = TINY.build(folder, latent_shape=[4, 1, 8, 6])
    picture = torch.rand(1, 3, 64, 48) * 2 - 1
    made = family.encode_pixels(picture)
    network = family._load_vae()
    wanted = network.encode(picture[:, :, None]).latent_dist.mode() * network.config.scaling_factor
    assert torch.allclose(made, wanted, atol=1e-6) and not torch.allclose(made, wanted / 1.15, atol=1e-3)
    pixels = network.decode(made / network.config.scaling_factor).sample.transpose(1, 2)
    assert torch.allclose(family.to_pixels(made), pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("structure", "options", "words"),
    [
        ({"use_rotary_positional_embeddings": True, "ofs_embed_dim": 8}, {}, "has ofs_embed_dim .image to video"),
        ({"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}, {},
         "has use_learned_positional_embeddings"),
        ({}, {"latent_shape": [4, 3, 7, 6]}, r"\[3, 7, 6\] is not divisible by the teacher's patches \[1, 2, 2\]"),
        ({"patch_size_t": 2}, {"latent_shape": [4, 3, 8, 6]}, r"patches \[2, 2, 2\]"),
        ({"patch_size_t": 2}, {"latent_shape": [4, 2, 12, 6]}, r"\[12, 6\] are larger than the teacher's positions"),
        ({}, {"latent_shape": [5, 3, 8, 6]}, "the teacher takes 4 channels, not 5"),
        ({}, {"latent_shape": [4, 8, 6]}, r"\[C, frames, H, W\], not \[4, 8, 6\]"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_said(structure: Any, options: Any, words: str, tmp_path: Path) -> None:
    CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=6, sample_height=8, sample_frames=9, max_text_seq_length=7,
        **structure,
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    with pytest.raises(UserError, match=words):
        TINY.build(tmp_path, **options).check_teacher()


def test_prompts_have_the_networks_length(folder: Path) -> None:
    family = TINY.build(folder)
    family.check_teacher()
    family.check_conditions(family.conditions(TINY.rows(2)))
    short = {name: column[:, :5] for name, column in TINY.rows(2).items()}
    with pytest.raises(UserError, match="has 5 tokens a row, but the teacher takes 7"):
        family.check_conditions(family.conditions(short))


def test_weights_are_under_the_pipelines_name(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    names = {f"transformer.{name}" for name in load_file(file)}
    assert names == set(TINY.build(folder).load_teacher().state_dict()) and np.all([len(name) > 0 for name in names])
