"""Rectified-flow transformers of pictures: what each refuses, what it needs, and the features of its blocks."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS

torch.set_num_threads(1)

NAMES = ("sd3", "flux", "z_image", "flux2_klein")
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("sd3", {}, {"latent_shape": [8, 8, 6]}, "latent_shape: the teacher takes 4 channels, not 8"),
    ("sd3", {}, {"latent_shape": [4, 7, 6]}, r"latent_shape: \[7, 6\] is not divisible by the teacher's patches 2"),
    ("sd3", {}, {"latent_shape": [4, 18, 6]}, r"latent_shape: \[9, 3\] patches .* the teacher has 8 positions"),
    ("sd3", {}, {"latent_shape": [4, 1, 8, 6]}, r"latent_shape: \[C, H, W\], not \[4, 1, 8, 6\]"),
    ("sd3", {"in_channels": 5}, {}, "takes 5 channels and gives 4 .another variant"),
    ("flux", {}, {"latent_shape": [8, 8, 6]}, "latent_shape: the teacher takes 4 channels, not 8"),
    ("flux", {}, {"latent_shape": [4, 7, 6]}, "H and W even, not"),
    ("flux", {"in_channels": 96, "out_channels": 16}, {}, "takes 96 channels and gives 16 .*Fill, Depth and Canny"),
    ("flux", {"guidance_embeds": False}, {"embedded_guidance": 2.0}, "embedded_guidance: .* takes no guidance .*leave"),
    ("flux", {}, {"embedded_guidance": -1}, "embedded_guidance: a number from 0 on is needed, not -1"),
    ("flux", {}, {"embedded_guidance": "3"}, "embedded_guidance: a number from 0 on is needed, not '3'"),
    ("flux", {}, {"embedded_guidance": True}, "embedded_guidance: a number from 0 on is needed, not True"),
    ("flux", {}, {"embeded_guidance": 3.0}, "no such option; did you mean 'embedded_guidance'"),
    ("z_image", {}, {"latent_shape": [8, 8, 6]}, "latent_shape: the teacher takes 4 channels, not 8"),
    ("z_image", {}, {"latent_shape": [4, 8, 5]}, "H and W even, not"),
    (
        "z_image",
        {},
        {"latent_shape": [4, 8, 66]},
        r"latent_shape: \[4, 33\] patches .* has \[32, 32\] positions",
    ),
    ("z_image", {"siglip_feat_dim": 8}, {}, "takes pictures' embeddings .siglip_feat_dim 8, as Z-Image-Omni does"),
    ("z_image", {"all_patch_size": [4]}, {}, r"has patches \[\(4, 1\)\] .* takes one with \(2, 1\)"),
    ("flux2_klein", {}, {"latent_shape": [32, 4, 3]}, "latent_shape: the teacher takes 16 channels, not 32"),
    ("flux2_klein", {}, {"latent_shape": [4, 8]}, r"latent_shape: \[C, H, W\], not \[4, 8\]"),
    ("flux2_klein", {"guidance_embeds": True}, {}, "takes a guidance scale .guidance_embeds, as FLUX.2 dev's"),
    ("flux2_klein", {"out_channels": 8}, {}, "takes 16 channels and gives 8 "),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: TINY_MODELS[name].save(tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.mark.parametrize(("name", "changes", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused(
    name: str, changes: dict[str, Any], options: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[name] / "transformer" / "config.json").read_text())
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message) as error:
        build_family(name, str(tmp_path), {**TINY_MODELS[name].options, **options}).check_teacher()
    assert "\n" not in str(error.value) and str(error.value).startswith("teacher.")
    TINY_MODELS[name].build(folders[name]).check_teacher()


@pytest.mark.parametrize("name", NAMES)
def test_another_pipeline_is_refused(name: str, folders: dict[str, Path]) -> None:
    family, index = TINY_MODELS[name].build(folders[name]), folders[name] / "model_index.json"
    for kind, refused in ((f"{type(family).pipeline_class[:-8]}InpaintPipeline", True), (family.pipeline_class, False)):
        index.write_text(json.dumps({"_class_name": kind}))
        if refused:
            with pytest.raises(UserError, match=f"is of a {kind}; family '{name}' takes a {family.pipeline_class}"):
                family.check_teacher()
        else:
            family.check_teacher()
    index.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_do_not_fit_are_refused(name: str, folders: dict[str, Path]) -> None:
    family, rows = TINY_MODELS[name].build(folders[name]), TINY_MODELS[name].rows(2)
    family.check_teacher()
    family.check_conditions(family.conditions(rows))
    for column in family.widths:
        without = {key: value for key, value in rows.items() if key != column}
        with pytest.raises(UserError, match=f"'{column}'"):
            family.conditions(without)
        wider = {key: value.repeat(2, axis=-1) for key, value in rows.items() if key in (column, f"negative_{column}")}
        width = rows[column].shape[-1]
        with pytest.raises(UserError, match=f"'{column}' is of width {2 * width}, but the teacher takes {width}"):
            family.check_conditions(family.conditions({**rows, **wider}))
        for one in wider:
            with pytest.raises(UserError, match=f"prompts: 'negative_{column}' is .* and '{column}' "):
                family.conditions({**rows, one: wider[one]})


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_pictures_tokens_in_their_places(name: str, folders: dict[str, Path]) -> None:
    """A change at the picture's first corner moves the features there most, in the first block; text's are no part."""
    family = TINY_MODELS[name].build(folders[name])
    teacher = family.load_teacher()
    shape = teacher.feature_shape(family.latent_shape)
    _, high, wide = family.patches
    assert shape[1:] == (family.latent_shape[1] // high, family.latent_shape[2] // wide)
    found: dict[str, torch.Tensor] = {}
    blocks = teacher.feature_blocks()
    for key, block in blocks.items():
        block.register_forward_hook(
            lambda module, given, output, key=key: found.__setitem__(key, teacher.feature_map(output, shape))
        )
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    conditions = family.conditions(TINY_MODELS[name].rows(2))

    def features(x: torch.Tensor) -> dict[str, torch.Tensor]:
        found.clear()
        with torch.no_grad():
            teacher(x, torch.tensor([0.3, 0.6]), conditions)
        return dict(found)

    before = features(x)
    assert list(before) == list(blocks) and len(blocks) == 2 + (name == "flux2_klein")
    for value in before.values():
        assert value.shape == (2, *shape) and value.isfinite().all()
    for row, column in ((0, 0), (shape[1] - 1, 1)):
        changed = x.clone()
        changed[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 3.0
        moved = (features(changed)["blocks.0"] - before["blocks.0"]).abs().amax(1)
        assert (moved.flatten(1).argmax(1) == row * shape[2] + column).all(), moved


@pytest.mark.parametrize("name", NAMES)
def test_sizes_go_by_the_vae_and_the_patches(name: str, folders: dict[str, Path]) -> None:
    family: Family = TINY_MODELS[name].build(folders[name])
    width, height = family.picture_size
    assert family.shape_for(width, height) == family.latent_shape
    assert family.patches is not None
    step = width // family.latent_shape[-1] * family.patches[2]
    assert step == 4
    with pytest.raises(UserError, match=f"sizes: .* that {step} divides"):
        family.shape_for(width + step // 2, height)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_sample_is_of_1024_pixels_and_fits_the_real_network(name: str) -> None:
    """By the defaults of diffusers' class, which are the real network's sizes."""
    family = build_family(name)
    assert isinstance(family, PretrainedFamily)
    kind = getattr(diffusers, family.network_class)
    parameters = inspect.signature(kind.__init__).parameters.values()
    config = FrozenDict({each.name: each.default for each in parameters if each.default is not each.empty})
    own = {"guidance_embeds": False} if name == "flux2_klein" else {}  # whose default is dev's
    family._check_config(FrozenDict({**config, **own}))
    assert family.picture_size == (1024, 1024)
    with pytest.raises(UserError, match="teacher.options.latent_shape: the teacher takes "):
        other = build_family(name, None, {"latent_shape": [12, *family.latent_shape[1:]]})
        assert isinstance(other, PretrainedFamily)
        other._check_config(FrozenDict({**config, **own}))
