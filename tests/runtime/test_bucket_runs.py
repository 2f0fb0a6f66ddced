"""A run over two buckets, one of them of several frames: the same bits for any workers, on Ray or in one process."""

import json
from pathlib import Path

import ray
import torch
from rich.console import Console
from safetensors.torch import load_file

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.methods.loading import parse_recipe
from raydmd.methods.local import train
from raydmd.models.buckets import Buckets
from raydmd.models.tiny.wan import TinyWan
from raydmd.runs.folders import expert_file
from raydmd.runs.run import recipe_family
from raydmd.runtime.cluster import join_or_start
from raydmd.runtime.launch import distill

TINY = TinyWan()


def recipe_for(teacher: Path, prompts: Path, generators: int, fakes: int, teachers: int) -> Recipe:
    workers = {"generator": generators, "fake": fakes, "teacher": teachers}
    return parse_recipe(
        {
            "name": "x", "iterations": 4, "seed": 11, "batch": {"size": 6, "micro": 1},
            "teacher": {"family": "wan", "path": str(teacher), "guidance_scale": 3, "options": dict(TINY.options)},
            "method": {"name": "phased", "fake_updates": 1, "experts": {"kind": "lora", "rank": 2}},
            "monitor": {"samples_every": 0, "tensorboard": False}, "checkpoint": {"every": 2},
            "prompts": {
                "path": str(prompts),
                "buckets": [{"size": [9, 64, 48], "weight": 2}, {"size": [1, 48, 80], "weight": 3}],
            },
            "runtime": {role: {"max_workers": count, "cpus": 0.1} for role, count in workers.items()},
        },
        "x",
    )  # fmt: skip


def test_the_same_bits_for_any_workers_and_after_a_stop(tmp_path: Path) -> None:
    """2/2/3 workers, a stop in the middle, and 1/1/1 go on; what they go on with are the same sizes."""
    teacher = TINY.save(tmp_path / "teacher")
    prompts = write_prompts(tmp_path / "prompts.parquet", TINY.rows(5))
    recipe = recipe_for(teacher, prompts, 1, 1, 1)
    family = recipe_family(recipe)
    buckets = Buckets(recipe, family)
    shapes = [buckets.family(draw).latent_shape for draw in range(8)]
    assert set(shapes[:4]) == set(shapes[4:]) == {(4, 3, 8, 6), (4, 1, 6, 10)}  # in either phase
    assert set(shapes[1::2]) == set(shapes[::2])  # and of either stream
    experts = train(recipe, family, family.load_teacher(), PromptTable(prompts, family.condition_columns)).experts
    several, quiet = recipe_for(teacher, prompts, 2, 2, 3), Console(quiet=True)
    assert join_or_start(2, 100)
    try:
        assert distill(several, tmp_path / "run", console=quiet, until=3) is False
        assert distill(recipe, tmp_path / "run", console=quiet) is True
    finally:
        ray.shutdown()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    size_of = {(4, 3, 8, 6): [9, 64, 48], (4, 1, 6, 10): [1, 48, 80]}
    assert [line["buckets"] for line in lines] == [
        {role: [size_of[shapes[2 * n + draw]]] for draw, role in enumerate(("fake", "generator"))} for n in range(4)
    ]
    for index, expert in enumerate(experts):
        found = load_file(expert_file(tmp_path / "run", index))
        assert found.keys() == expert.keys()
        assert all(torch.equal(found[key], value) for key, value in expert.items()), index
