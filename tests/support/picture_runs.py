"""Runs of image to video on tiny Wans: captioned pictures, encoded in this process as a run encodes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.data.encoded_table import EncodedTable
from raydmd.evaluation.validation_prompts import check_validation_prompts
from raydmd.methods.loading import parse_recipe
from raydmd.models.encoding import encoded_facts, texts_for
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.models.tiny.wan import WIDTH, TinyWan22ImageToVideo
from raydmd.recipe_check import check, check_encoded
from raydmd.runs.run import recipe_family
from raydmd.runtime.encode import FILE, NUMBER, PLACES, TEXTS, PromptEncoder

CAPTIONS = ["a red fox", "a fox in snow", "two foxes"]


def captioned_pictures(folder: Path) -> Path:
    """Write a folder of pictures ``0.png`` .. ``2.png`` of different sizes, with captions."""
    draw = np.random.default_rng(0)
    for number in range(3):
        pixels = draw.integers(0, 256, (70, 50 + 9 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def encoded_recipe(root: Path, pictures: Path, tiny: str = "wan_i2v", buckets: Any = None) -> Recipe:
    """Make a teacher with a text encoder below ``root``, and encode a folder of pictures; return a recipe on both."""
    model = TinyWan22ImageToVideo() if tiny == "wan22_i2v" else TINY_MODELS[tiny]
    teacher = model.save(root / tiny)
    file = teacher / "model_index.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    put_text_encoder("wan", WIDTH, teacher)
    named = {key: value for key, value in before.items() if value not in (None, [None, None])}
    index = {**json.loads(file.read_text()), **named, "_class_name": "WanImageToVideoPipeline"}
    file.write_text(json.dumps(index))
    recipe = parse_recipe(
        {
            "name": "x", "iterations": 2, "batch": {"size": 1}, "prompts": {"path": str(pictures), "buckets": buckets},
            "teacher": {"family": "wan", "path": str(teacher), "options": dict(model.options), "guidance_scale": 2},
            "method": {"name": "phased", "fake_updates": 1, "experts": {"kind": "lora", "rank": 2}},
            "monitor": {"prompts": ["two foxes", 1]}, "runtime": {"encoder": {"batch": 2}},
        },
        "x",
    )  # fmt: skip
    family = recipe_family(recipe)
    check(recipe)
    check_validation_prompts(recipe, family)
    texts = texts_for(family, str(pictures))
    assert texts is not None
    facts = encoded_facts(family, texts, 2)
    table, worker = EncodedTable(str(root / "table"), facts, "--out"), PromptEncoder(recipe, facts, str(pictures))
    table.claim()
    for number in range(table.files):
        rows = range(*table.span(number))
        work = [json.dumps([texts.texts[row] for row in rows]), json.dumps([texts.where(row) for row in rows])]
        item = {NUMBER: np.array([number]), TEXTS: np.array(work[:1]), PLACES: np.array(work[1:])}
        table.commit(number, bytes(worker(item)[FILE][0]))
    encoded = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"path": table.place})})
    check_encoded(encoded)
    return encoded
