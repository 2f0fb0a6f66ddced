"""Prompts as they come, for the rectified-flow transformers of pictures: as their pipelines encode them."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.text_encoders import put_text_encoder

torch.set_num_threads(1)

WIDTHS = {"sd3": 16, "flux": 16, "z_image": 16, "flux2_klein": 24}
TEXTS = ["a red fox in the snow", "two birds"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family's text encoders, with the network's config beside them."""
    made = {}
    for name, width in WIDTHS.items():
        made[name] = tmp_path_factory.mktemp(name)
        put_text_encoder(name, width, made[name])
        config = TINY_MODELS[name].parts()["transformer"]
        config.save_config(made[name] / "transformer")
    return made


def whole(family: Family, folder: Path, **parts: Any) -> Any:
    kind = getattr(diffusers, type(family).pipeline_class)
    return kind.from_pretrained(folder, transformer=None, vae=None, scheduler=None, **parts)


def padded(embeds: list[torch.Tensor], length: int) -> np.ndarray:
    return np.stack([np.pad(each, ((0, length - len(each)), (0, 0))) for each in embeds])


@pytest.mark.parametrize("name", WIDTHS)
def test_rows_are_what_the_pipeline_encodes(name: str, folders: dict[str, Path]) -> None:
    family = TINY_MODELS[name].build(folders[name])
    assert family.reads_text
    texts = list(TEXTS)
    rows = family.encode_prompts(texts)
    assert texts == TEXTS  # ZImagePipeline writes its templates into the list that it is given
    assert set(rows) == set(family.condition_columns)
    with torch.no_grad():
        pipeline = whole(family, folders[name])
        if name == "sd3":
            made = pipeline.encode_prompt(TEXTS, TEXTS, TEXTS, negative_prompt=["", ""])
            wanted = dict(zip(
                ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
                made, strict=True,
            ))  # fmt: skip
            assert rows["prompt_embeds"].shape == (2, 77 + 256, 16)
        elif name == "flux":
            wanted = {}
            for before, prompts in (("", TEXTS), ("negative_", ["", ""])):
                wanted[f"{before}prompt_embeds"], wanted[f"{before}pooled_prompt_embeds"], _ = pipeline.encode_prompt(
                    prompts
                )
            assert rows["prompt_embeds"].shape == (2, 512, 16)
        elif name == "z_image":
            own, null = pipeline.encode_prompt(list(TEXTS))
            assert len(own[0]) != len(own[1]) and len(null[0]) < len(own[1])
            length, short = rows["prompt_embeds"].shape[1], rows["negative_prompt_embeds"].shape[1]
            assert length % 32 == 0 and rows["prompt_embeds_mask"].sum(1).tolist() == [len(each) for each in own]
            assert rows["negative_prompt_embeds_mask"].sum(1).tolist() == [len(each) for each in null]
            wanted = {"prompt_embeds": padded(own, length), "negative_prompt_embeds": padded(null, short)}
        else:
            made = pipeline.encode_prompt([*TEXTS, ""])[0]
            wanted = {"prompt_embeds": made[:2], "negative_prompt_embeds": made[2:].expand(2, -1, -1)}
            assert rows["prompt_embeds"].shape == (2, 512, 24)
    for column, values in wanted.items():
        assert rows[column].dtype == np.float32
        assert np.allclose(rows[column], values, atol=1e-5), column
        other = rows[f"negative_{column}"] if column in family.widths else None  # type: ignore[attr-defined]
        assert other is None or other.shape != rows[column].shape or not np.allclose(other, values, atol=1e-2)
    assert not np.allclose(rows["prompt_embeds"][0], rows["prompt_embeds"][1], atol=1e-2)
    conditions = family.conditions(rows)
    assert conditions["prompt_embeds"].shape == conditions["negative_prompt_embeds"].shape


def test_sd3_without_t5_has_zeros_for_its_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    """As wide as the network takes them, though its weights are not loaded."""
    folder = tmp_path / "sd3"
    shutil.copytree(folders["sd3"], folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    rows, full = (TINY_MODELS["sd3"].build(place).encode_prompts(TEXTS) for place in (folder, folders["sd3"]))
    assert rows["prompt_embeds"].shape == full["prompt_embeds"].shape
    assert np.array_equal(rows["prompt_embeds"][:, :77], full["prompt_embeds"][:, :77])
    assert not rows["prompt_embeds"][:, 77:].any() and full["prompt_embeds"][:, 77:].any()
    assert np.array_equal(rows["pooled_prompt_embeds"], full["pooled_prompt_embeds"])


def test_no_null_prompt_is_encoded_where_none_is_wanted(folders: dict[str, Path]) -> None:
    rows = TINY_MODELS["flux"].build(folders["flux"], null_prompt=False).encode_prompts(TEXTS[:1])
    assert set(rows) == {"prompt_embeds", "pooled_prompt_embeds"}


def test_flux_without_t5_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    shutil.copytree(folders["flux"], folder)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match="teacher.path: cannot load the text encoder") as error:
        TINY_MODELS["flux"].build(folder).encode_prompts(TEXTS)
    assert "\n" not in str(error.value)
