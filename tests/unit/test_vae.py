"""Factors, patches and statistics come from the VAE's and the transformer's configs; float16 is decoded in float32."""

import json

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, QwenImageTransformer2DModel, WanTransformer3DModel
from test_families_diffusers import CONFIGS, SHAPES, STATISTICS, rows
from test_large_families import large_recipe

from raydmd.errors import UserError
from raydmd.models.diffusers.autoencoder import WanAutoencoder
from raydmd.models.diffusers.packing import pack, unpack
from raydmd.models.registry import build_family
from raydmd.recipe_check import check

torch.set_num_threads(1)

SMALL = dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **STATISTICS)
WAN_22 = dict(in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)  # as TI2V-5B's
KINDS = {"qwen_image": AutoencoderKLQwenImage, "wan": AutoencoderKLWan}
GEOMETRIES = {
    "qwen's": ("qwen_image", {}, 8, 4),
    "qwen's, two levels": ("qwen_image", dict(dim_mult=[1, 1, 1], temperal_downsample=[False, True]), 4, 2),
    "wan 2.1's": ("wan", {}, 8, 4),
    "wan 2.2's": ("wan", WAN_22, 16, 4),
    "wan 2.2's, residual": ("wan", {**WAN_22, "is_residual": True, "num_res_blocks": 2}, 16, 4),
    "wan, frames halved once": ("wan", dict(temperal_downsample=[False, False, True]), 8, 2),
    "wan, two levels, factors that lie": ("wan", dict(dim_mult=[1, 1, 1], temperal_downsample=[True, True]), 4, 4),
}


def save_vae(folder, name, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        KINDS[name](**{**SMALL, **changes}).save_pretrained(folder / "vae")


def family_of(name, folder, **options):
    return build_family(name, str(folder), {"latent_shape": SHAPES[name], **options})


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_factors_are_those_of_what_the_vae_makes(kind, tmp_path):
    name, changes, spatial, temporal = GEOMETRIES[kind]
    save_vae(tmp_path, name, **changes)
    family = family_of(name, tmp_path)
    channels, latent_frames, height, width = family.latent_shape
    frames = family.decode_video(torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0)))
    assert frames.shape == (1, family.frames, 3, *reversed(family.picture_size))
    assert family.picture_size == (spatial * width, spatial * height)
    assert family.frames == 1 + temporal * (latent_frames - 1)
    size = (spatial * 2 * 5, spatial * 2 * 7)
    assert family.shape_for(*size) == (channels, latent_frames, 14, 10)
    assert family.shape_for(*family.picture_size) == family.latent_shape
    with pytest.raises(UserError, match=f"that {2 * spatial} divides"):
        family.shape_for(size[0] + spatial, size[1])


def test_where_the_structure_is_not_said_the_factors_are():
    said = dict(latents_mean=[0.0], latents_std=[1.0], z_dim=1)
    other = WanAutoencoder.read({**said, "scale_factor_spatial": 32, "scale_factor_temporal": 8}, 1)
    assert (other.spatial, other.temporal) == (32, 8)
    plain = WanAutoencoder.read(said, 1)
    assert (plain.spatial, plain.temporal) == (8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latents_mean=[0.0]), "have 1 and 4 numbers, not z_dim 4"),
        (dict(latents_std=[1.0, 1.0, 0.0, 1.0]), "latents_std has 0"),
        (dict(latents_std=None), "latents_std is not a list"),
        (dict(latents_mean=[0.0, 0.0, 0.0, None]), "latents_mean is not a list of finite"),
        (dict(patch_size=0), "patch_size is 0"),
        (dict(z_dim=2, latents_mean=[0.0] * 2, latents_std=[1.0] * 2), "VAE takes 2 channels, not 4"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused_before_a_run_begins(change, message, tmp_path):
    recipe = large_recipe("wan", tmp_path)
    save_vae(tmp_path, "wan")
    check(recipe)
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        check(recipe)
    assert "\n" not in str(error.value) and str(error.value).startswith("teacher.")


def test_patches_come_from_the_transformer(tmp_path):
    """Sides that a picture may have; and Qwen-Image's own packing."""
    for number, patch in enumerate([(1, 1, 1), (1, 4, 2)]):
        folder = tmp_path / str(number)
        WanTransformer3DModel(**{**CONFIGS["wan"], "patch_size": patch}).save_pretrained(folder / "transformer")
        family = family_of("wan", folder)
        assert family.patches == patch
        good = (8 * patch[2] * 3, 8 * patch[1] * 3)
        assert family.shape_for(*good) == (4, 3, good[1] // 8, good[0] // 8)
        if patch[1] > 1:
            with pytest.raises(UserError, match="16 and 32 divides"):
                family.shape_for(good[0], good[1] + 8)
    assert family_of("wan", tmp_path).patches == (1, 2, 2)  # none there yet
    config = {**CONFIGS["qwen_image"], "patch_size": 1, "in_channels": 4, "out_channels": 4}
    QwenImageTransformer2DModel(**config).save_pretrained(tmp_path / "qwen" / "transformer")
    family = family_of("qwen_image", tmp_path / "qwen")
    assert family.patches == (1, 1, 1) and family.shape_for(56, 24) == (4, 1, 3, 7)
    x, t = torch.randn(2, 4, 1, 8, 6), torch.tensor([0.3, 0.6], dtype=torch.float64)
    conditions = family.conditions(rows(2))
    teacher = family.load_teacher()
    with torch.no_grad():
        tokens = teacher.transformer(
            hidden_states=x.flatten(2).transpose(1, 2), timestep=t.float(), img_shapes=[[(1, 8, 6)]] * 2,
            encoder_hidden_states=conditions["prompt_embeds"], return_dict=False,
            encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
        )[0]  # fmt: skip
        assert torch.allclose(teacher(x, t, conditions), tokens.transpose(1, 2).reshape(x.shape), atol=1e-6)
    for p in (1, 2):
        assert torch.equal(unpack(pack(x, p), x.shape, p), x)
    (tmp_path / "qwen" / "transformer" / "config.json").write_text('{"patch_size": "2"}')
    with pytest.raises(UserError, match="patch_size '2'"):
        family_of("qwen_image", tmp_path / "qwen").shape_for(64, 64)


@pytest.mark.parametrize("name", KINDS)
def test_a_half_precision_vae_that_overflows_decodes_in_float32(name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = KINDS[name](**SMALL)
    with torch.no_grad():  # what follows is normalised: the picture is not extreme, its way there is
        vae.post_quant_conv.weight.mul_(1e5)
    vae.save_pretrained(tmp_path / "vae")
    x = torch.randn(2, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    right = family_of(name, tmp_path).decode_video(x)
    assert right.isfinite().all() and right.std() > 1e-3
    assert torch.equal(family_of(name, tmp_path, dtype="float16").decode_video(x), right)
    brain = family_of(name, tmp_path, dtype="bfloat16")
    assert (brain.decode_video(x) - right).abs().mean() < 0.05 and brain._load_vae().dtype == torch.bfloat16
    with torch.no_grad():  # as it was
        half = vae.half().decode(x.half() * 2, return_dict=False)[0]
    assert not half.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_clipped(bad, tmp_path):
    save_vae(tmp_path, "wan")
    family = family_of("wan", tmp_path)
    x = torch.zeros(2, *SHAPES["wan"])
    x[1, 0, 1, 2, 3] = bad
    frames = family.decode_video(x)
    assert frames[0].isfinite().all() and frames[1].isnan().any()
