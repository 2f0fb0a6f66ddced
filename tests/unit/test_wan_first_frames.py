"""The column of Wan's image to video, made of a picture as WanImageToVideoPipeline makes it."""

import json
from pathlib import Path

import pytest
import torch
from test_every_family import moved

from raydmd.errors import UserError
from raydmd.models.diffusers.wan import WanFamily
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.wan import TinyWanImageToVideo

torch.set_num_threads(1)

TINY = TINY_MODELS["wan_i2v"]
FRAMES, HEIGHT, WIDTH = 9, 64, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("i2v"))


def test_mask_and_latents_are_the_pipelines(folder: Path) -> None:
    assert isinstance(TINY, TinyWanImageToVideo)
    family = TINY.encoder
    pictures = 2.0 * torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) - 1.0
    with torch.no_grad():
        wanted = torch.cat([
            TINY.pipeline(folder).prepare_latents(picture[None], 1, 4, HEIGHT, WIDTH, FRAMES, torch.float32)[1]
            for picture in pictures
        ])  # fmt: skip
    made = family.encode_first_frames(pictures)
    assert made.shape == (2, 8, *family.latent_shape[1:])
    assert (made - wanted).abs().max() <= 1e-5
    assert made[:, :4, 0].eq(1).all() and made[:, :4, 1:].eq(0).all()
    assert moved(family.encode_first_frames(pictures / 2 + 0.5), wanted)  # pictures in [0, 1]
    larger = family.encode_first_frames(torch.zeros(1, 3, 80, 64))
    assert larger.shape == (1, 8, family.latent_shape[1], 10, 8)


def test_what_cannot_be_followed_is_refused(folder: Path) -> None:
    pictures = torch.zeros(1, 3, HEIGHT, WIDTH)
    with pytest.raises(UserError, match="a first frame makes 8 of them .*, not 5"):
        TINY.build(folder, image_channels=5).encode_first_frames(pictures)
    with pytest.raises(UserError, match="has no VAE"):
        WanFamily(str(folder / "transformer"), TINY.options).encode_first_frames(pictures)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanImageToVideoPipeline", "expand_timesteps": True})
    )
    with pytest.raises(UserError, match="has expand_timesteps"):
        TINY.build(folder).check_teacher()
