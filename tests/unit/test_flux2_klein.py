"""Flux.2 klein: its law of the shift, and the statistics of its VAE's batch norm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from test_every_family import recipe_of

from raydmd.errors import UserError
from raydmd.models.diffusers.flux2_autoencoder import patchify, unpatchify
from raydmd.models.diffusers.flux2_klein import empirical_mu
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS
from raydmd.recipe_check import check

torch.set_num_threads(1)

TINY = TINY_MODELS["flux2_klein"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("flux2_klein"))


@pytest.mark.parametrize("shape", [[128, 64, 64], [128, 80, 60], [128, 32, 32]])
@pytest.mark.parametrize("steps", [4, 50])
def test_the_times_are_those_of_diffusers_scheduler(steps: int, shape: list[int], tmp_path: Path) -> None:
    """The shift goes by the steps, too; another number's, or the line of the scheduler's config, is another grid."""
    tokens = shape[1] * shape[2]
    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-9)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    family = build_family("flux2_klein", str(tmp_path), {"latent_shape": shape})
    sigmas, mu = np.linspace(1.0, 1 / steps, steps), compute_empirical_mu(tokens, steps)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    assert torch.allclose(torch.tensor(family.teacher_times(steps)), scheduler.sigmas, atol=3e-6)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=1.15)
    assert (torch.tensor(family.teacher_times(steps)) - scheduler.sigmas).abs().max() > 1e-2


def test_latents_are_the_vaes_in_patches_by_its_statistics(folder: Path) -> None:
    """Decoded as the pipeline decodes; encoding undoes it. Without the statistics both are others."""
    family = TINY.build(folder)
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae").eval()
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    mean, std = vae.bn.running_mean.view(1, -1, 1, 1), (vae.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
    with torch.no_grad():
        right, wrong = (vae.decode(Flux2KleinPipeline._unpatchify_latents(z)).sample for z in (x * std + mean, x))
        pixels = family.to_pixels(x)[:, 0]
        assert torch.allclose(pixels, right, atol=1e-5) and not torch.allclose(pixels, wrong, atol=1e-2)
        latents = Flux2KleinPipeline._patchify_latents(vae.encode(right).latent_dist.mode())
        assert torch.allclose(family.encode_pixels(right), (latents - mean) / std, atol=1e-5)
        assert not torch.allclose(family.encode_pixels(right), latents, atol=1e-2)
    assert torch.equal(unpatchify(patchify(right, 2), 2), right)
    assert torch.equal(patchify(right, 2), Flux2KleinPipeline._patchify_latents(right))


def test_a_step_distilled_teacher_is_not_guided(folder: Path) -> None:
    """Its pipeline ignores guidance."""
    recipes = [recipe_of(TINY, folder, f"teacher.guidance_scale={scale}") for scale in (1.0, 3.0)]
    index = folder / "model_index.json"
    try:
        for distilled in (False, True):
            index.write_text(json.dumps({"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}))
            check(recipes[0])
            if distilled:
                with pytest.raises(UserError, match="teacher.guidance_scale: .* is step-distilled .*; use 1"):
                    check(recipes[1])
            else:
                check(recipes[1])
    finally:
        index.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 8}, "latent_shape: the VAE takes 32 channels, not 16"),
        ({"patch_size": [1, 2]}, r"patch_size is \[1, 2\], not two equal whole numbers"),
        ({"_class_name": "AutoencoderKL"}, "is of class AutoencoderKL, not AutoencoderKLFlux2"),
    ],
)
def test_another_vae_is_refused(changes: dict[str, object], message: str, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message) as error:
        print(TINY.build(tmp_path).vae)
    assert "\n" not in str(error.value)
