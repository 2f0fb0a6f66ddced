"""Prompts as they come: the text encoders of Qwen-Image and Wan, from the family to the served picture."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from local_serving import newer, pixels, serving
from run_folders import make_run
from test_large_families import SHAPES, WIDTH, large_recipe

from raydmd.cli import run as command
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.models.registry import build_family
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.runs.run import Run, recipe_family
from raydmd.serving.contract import BadRequest, Format, GenerationRequest, GenerationResult
from raydmd.serving.local import local_pipeline
from raydmd.serving.stage import Engine

NAMES = ("qwen_image", "wan")
TEXT = "a red fox in the snow"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of each family, with the text encoder beside the teacher's transformer."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        recipe = large_recipe(name, folder, "optimizer.generator.lr=0.3")
        put_text_encoder(name, WIDTH, folder)
        made[name] = folder / "run"
        table = PromptTable(str(recipe.prompts.path), recipe_family(recipe).condition_columns)
        make_run(recipe, made[name], table)
    return made


def teacher_folder(run: Path) -> Path:
    return run.parent


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_the_pipeline_encodes(name: str, runs: dict[str, Path]) -> None:
    family = Run(runs[name]).family
    assert family.reads_text
    rows = family.encode_prompts([TEXT])
    kind = {"qwen_image": diffusers.QwenImagePipeline, "wan": diffusers.WanPipeline}[name]
    whole = kind.from_pretrained(teacher_folder(runs[name]), transformer=None, vae=None, scheduler=None)
    tokens = whole.tokenizer(TEXT).input_ids
    with torch.no_grad():
        if name == "qwen_image":
            ids = whole.tokenizer(whole.prompt_template_encode.format(TEXT), return_tensors="pt").input_ids
            right = whole.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            right, wrong = right[whole.prompt_template_encode_start_idx :], right
            length = -(-len(right) // 64) * 64
            assert rows["prompt_embeds_mask"].tolist() == [[1] * len(right) + [0] * (length - len(right))]
            assert length % 64 == 0 and length != len(right)
        else:
            right = whole.text_encoder(torch.tensor([tokens])).last_hidden_state[0]
            wrong, length = right.flip(0), 512
    embeds = rows["prompt_embeds"]
    assert embeds.shape == (1, length, WIDTH) and embeds.dtype == np.float32
    assert np.allclose(embeds[0, : len(right)], right, atol=1e-5) and not embeds[0, len(right) :].any()
    assert not np.allclose(embeds[0, : len(right)], wrong[: len(right)], atol=1e-2)
    other = family.encode_prompts([TEXT[::-1]])
    assert not np.allclose(other["prompt_embeds"], embeds, atol=1e-2)
    assert np.array_equal(other["negative_prompt_embeds"], rows["negative_prompt_embeds"])


@pytest.mark.parametrize("name", NAMES)
def test_the_null_prompt_is_a_setting(name: str, runs: dict[str, Path]) -> None:
    options = {"latent_shape": SHAPES[name], "negative_prompt": TEXT}
    rows = build_family(name, str(teacher_folder(runs[name])), options).encode_prompts(["a fox", TEXT])
    assert np.allclose(rows["negative_prompt_embeds"][0], rows["prompt_embeds"][1], atol=1e-5)
    assert not np.allclose(rows["negative_prompt_embeds"][0], rows["prompt_embeds"][0], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_served_the_same_in_any_layout(name: str, runs: dict[str, Path]) -> None:
    run, is_video = runs[name], name == "wan"
    output_format: Format = "mp4" if is_video else "png"

    def shown(made: GenerationResult) -> tuple[bytes, ...]:
        """Return what is to be seen, without what a PNG says of itself."""
        return made.pictures if is_video else tuple(pixels(file).tobytes() for file in made.pictures)

    async def test() -> None:
        files = []
        ways = ({"layout": "colocated", "teacher": True}, {"layout": "pipelined", "encoder": "own", "decoder": "own"})
        for way in ways:
            pipeline = local_pipeline(serving(run, **way))
            asks = [
                GenerationRequest(text, 2, 5, output_format=output_format) for text in (TEXT, TEXT + " at night", "7")
            ]
            made = await asyncio.gather(*(pipeline.make(ask) for ask in asks))
            assert all(each.seconds["encode"] > 0 for each in made)
            assert len({shown(each) for each in made}) == 3  # a figure is a text here, not a row of the table
            assert len({each.text_tokens for each in made}) > 1 and all(each.text_tokens[0] > 0 for each in made)
            again = await pipeline.make(asks[0])
            assert again.pictures == made[0].pictures and again.seconds["encode"] < made[0].seconds["encode"]
            files.append(made[0].pictures)
            if "teacher" in way:
                by_teacher = GenerationRequest(TEXT, 1, 5, "teacher", output_format=output_format)
                teacher = await pipeline.make(by_teacher)
                assert shown(teacher) != shown(await pipeline.make(replace(by_teacher, maker="student")))
                null = Run(run).family.options["negative_prompt"]
                against = [replace(by_teacher, negative_prompt=text) for text in (null, "at night")]
                same, other = await asyncio.gather(*(pipeline.make(ask) for ask in against))
                assert shown(same) == shown(teacher) != shown(other)
        if is_video:
            assert files[0] == files[1]
        else:
            assert all(abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(*files, strict=True))

    asyncio.run(test())


def test_without_a_text_encoder_prompts_are_the_tables(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(teacher_folder(runs["wan"]), tmp_path / "teacher", ignore=shutil.ignore_patterns("text_encoder"))
    run = tmp_path / "run"
    shutil.move(tmp_path / "teacher" / "run", run)
    recipe = (run / "recipe.yaml").read_text().replace(str(teacher_folder(runs["wan"])), str(tmp_path / "teacher"))
    (run / "recipe.yaml").write_text(recipe)
    family = Run(run).family
    assert not family.reads_text
    with pytest.raises(UserError, match="has no text_encoder/config.json"):
        family.encode_prompts([TEXT])
    pipeline = local_pipeline(serving(run))
    with pytest.raises(BadRequest, match="no column of texts"):
        asyncio.run(pipeline.make(GenerationRequest(TEXT, output_format="mp4")))
    assert asyncio.run(pipeline.make(GenerationRequest("2", output_format="mp4"))).pictures


def test_a_broken_text_encoder_is_said_in_a_line(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(teacher_folder(runs["wan"]), tmp_path / "teacher")
    (tmp_path / "teacher" / "text_encoder" / "model.safetensors").unlink()
    family = build_family("wan", str(tmp_path / "teacher"), {"latent_shape": SHAPES["wan"]})
    with pytest.raises(UserError, match="cannot load the text encoder of") as error:
        family.encode_prompts([TEXT])
    assert "\n" not in str(error.value)
    image = build_family("wan", str(tmp_path / "teacher"), {"latent_shape": SHAPES["wan"], "image_channels": 5})
    assert not image.reads_text  # text is not all that it needs


def test_newer_weights_keep_the_text_encoder(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["wan"], run)
    before = Engine(serving(run), ("encode", "expert-1"))
    newer(run, 1.5)
    after = Engine(serving(run), ("encode", "expert-1"), before)
    assert after.revision != before.revision and after.family is before.family
    assert after.walks["expert-1"].family is before.family
    assert after.encoder is before.encoder is not None
    assert Engine(serving(run), ("encode", "expert-1")).family is not before.family
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("guidance_scale: 4.0", "guidance_scale: 3.0"))
    other = Engine(serving(run), ("encode", "expert-1"), before)
    assert other.family is not before.family and other.encoder is not before.encoder


def test_generate_takes_any_text(runs: dict[str, Path], tmp_path: Path) -> None:
    assert command(["generate", str(runs["qwen_image"]), "--prompt", TEXT, "-n", "1", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-fox-in-the-snow-0-0.png"]


def test_without_the_null_prompt_the_teacher_is_served_without_guidance(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["qwen_image"], run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["teacher"]["guidance_scale"] = 1.0
    recipe["teacher"]["options"]["null_prompt"] = False
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pipeline = local_pipeline(serving(run, teacher=True, teacher_steps=1))
    ask = GenerationRequest(TEXT, 1, 5, "teacher")
    assert len(asyncio.run(pipeline.make(ask)).pictures) == 1
    with pytest.raises(BadRequest, match="guidance_scale: 'run' has no null prompt here .* only 1 is possible"):
        asyncio.run(pipeline.make(replace(ask, guidance_scale=2.0)))
    with pytest.raises(BadRequest, match="negative_prompt: 'run' has no null prompt here"):
        asyncio.run(pipeline.make(replace(ask, negative_prompt="a fox")))
