"""Samples of several sizes: each global batch is of one, drawn by its number; wrong sizes are a line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_every_family import recipe_of

from raydmd.config.buckets import shipped_buckets
from raydmd.config.recipe import Recipe
from raydmd.data.pictures import PictureFolder
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.errors import UserError
from raydmd.evaluation.sizes import choose_size, size_words, trained_sizes
from raydmd.methods.loading import load_recipe, parse_recipe
from raydmd.methods.local import LocalProgram, train
from raydmd.methods.program import trace_method
from raydmd.methods.registry import build_method, plan_phases
from raydmd.models.base import IMAGE_COLUMN, Family, bucket_column
from raydmd.models.buckets import Buckets, draw_bucket
from raydmd.models.heads import Heads
from raydmd.models.tiny import TINY_MODELS, TinyModel
from raydmd.recipe_check import check
from raydmd.runs.run import recipe_family
from raydmd.training.gan import ReferencedGenerator
from raydmd.training.messages import PromptBatch
from raydmd.training.trial import try_row

torch.set_num_threads(1)

FIXED = ("edm",)  # families of one size
SIZED = [name for name in TINY_MODELS if name not in FIXED]
SGTS = ["method.name=dmd-sgts", "method.steps=2", "method.fake_updates=3", "iterations=1", "batch={size: 2, micro: 1}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny.save(tmp_path_factory.mktemp(name)) for name, tiny in TINY_MODELS.items()}


def own_size(family: Family) -> list[int]:
    width, height = family.picture_size
    return [family.frames, height, width] if len(family.latent_shape) == 4 and family.frames > 1 else [height, width]


def two_sizes(family: Family) -> list[list[int]]:
    """The model's own size, and a wider one; of a video, of a single frame."""
    (_, unit), own = family.side_units, own_size(family)
    first = [min(family._frame_counts(1))] if len(own) == 3 else []
    return [own, [*first, own[-2], own[-1] + unit]]


def bucket_recipe(tiny: TinyModel, folder: Path, sizes: list, *overrides: str) -> Recipe:
    return recipe_of(tiny, folder, f"prompts.buckets={json.dumps(sizes)}", *SGTS, *overrides)


# The draw.


def test_the_draw_follows_the_weights_and_nothing_else() -> None:
    weights = [1.0, 3.0, 0.5]
    drawn = [draw_bucket(7, draw, weights) for draw in range(1500)]
    assert drawn[1234:1300] == [draw_bucket(7, draw, weights) for draw in range(1234, 1300)]  # begun anywhere
    assert drawn != [draw_bucket(8, draw, weights) for draw in range(1500)]
    counts = Counter(drawn)
    for bucket, weight in enumerate(weights):  # within 4 standard deviations
        share = weight / sum(weights)
        assert abs(counts[bucket] / 1500 - share) <= 4 * (share * (1 - share) / 1500) ** 0.5
    assert [draw_bucket(7, draw, [2.0, 6.0, 1.0]) for draw in range(400)] == drawn[:400]
    by_rank = [draw_bucket(7 + rank, 0, weights) for rank in range(40)]  # what a draw keyed by rank would give
    assert len(set(by_rank)) > 1


@pytest.mark.parametrize("name", SIZED)
def test_every_family_trains_on_two_sizes(name: str, folders: dict[str, Path]) -> None:
    tiny, folder = TINY_MODELS[name], folders[name]
    plain = recipe_family(recipe_of(tiny, folder))
    recipe, shapes = at_both(tiny, folder, two_sizes(plain))
    family = recipe_family(recipe)
    table = table_of(recipe, tiny, family, folder)
    seen: list[tuple[int, ...]] = []
    teacher = family.load_teacher()
    handle = teacher.register_forward_hook(lambda module, given, output: seen.append(tuple(given[0].shape[1:])))
    run = train(recipe, family, teacher, table)
    handle.remove()
    assert set(seen) == set(shapes)
    assert all(value.isfinite().all() for value in run.experts[0].values())
    assert any(value.any() for key, value in run.experts[0].items() if key.endswith("lora_B.weight"))
    for part in run.parts.values():
        try_row(part, "role", family.conditions(table.take(np.arange(1))))


def at_both(tiny: TinyModel, folder: Path, sizes: list) -> tuple[Recipe, list[tuple[int, ...]]]:
    """Return a recipe whose one iteration has batches of both sizes, the last, which is scored, of the second."""
    for seed in range(100):
        recipe = bucket_recipe(tiny, folder, sizes, f"seed={seed}")
        buckets = Buckets(recipe, recipe_family(recipe))
        drawn = [tuple(buckets.family(draw).latent_shape) for draw in range(4)]
        if set(drawn) == set(buckets.shapes) and drawn[-1] == buckets.shapes[1]:
            return recipe, buckets.shapes
    raise AssertionError("no seed draws both")


def table_of(recipe: Recipe, tiny: TinyModel, family: Family, folder: Path) -> PromptTable:
    """Return the prompts; of image to video, with the first frames at every size."""
    rows = tiny.rows(6)
    if IMAGE_COLUMN in family.condition_columns:
        for column, sized in Buckets(recipe, family).by_column().items():
            width, height = sized.picture_size
            pictures = torch.rand(6, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1
            rows[column] = sized.encode_first_frames(pictures).numpy()
    path = write_prompts(folder / "sized.parquet", {n: v for n, v in rows.items() if n in family.condition_columns})
    return PromptTable(path, family.condition_columns)


def test_one_bucket_of_the_models_own_size_changes_no_bit(folders: dict[str, Path]) -> None:
    tiny, folder = TINY_MODELS["qwen_image"], folders["qwen_image"]
    made = []
    for sizes in (None, [[64, 48]]):
        recipe = recipe_of(tiny, folder, f"prompts.buckets={json.dumps(sizes)}", *SGTS)
        family = recipe_family(recipe)
        if sizes is not None:
            sizes = [own_size(family)]
            recipe = recipe_of(tiny, folder, f"prompts.buckets={json.dumps(sizes)}", *SGTS)
        table = PromptTable(str(recipe.prompts.path), family.condition_columns)
        made.append(train(recipe, family, family.load_teacher(), table).experts[0])
    assert made[0].keys() == made[1].keys() and all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_how_the_batch_is_cut_changes_no_size(folders: dict[str, Path]) -> None:
    """All micro-batches of a draw are of its bucket, in every method's stream."""
    tiny, folder = TINY_MODELS["qwen_image"], folders["qwen_image"]
    sizes = two_sizes(recipe_family(recipe_of(tiny, folder)))
    drawn = []
    for micro in (1, 4):
        recipe = bucket_recipe(tiny, folder, sizes, "batch.size=4", f"batch.micro={micro}", "method.fake_updates=7")
        family = recipe_family(recipe)
        table = PromptTable(str(recipe.prompts.path), family.condition_columns)
        program = LocalProgram(build_method(recipe), family, family.load_teacher(), table)
        program.parts["generator"].start_phase(0, 0)
        made = [program.generator.rollout(0, update, program.prompts(0, update)) for update in range(7)]
        assert all(len({each.x_s.shape[1:] for each in draw}) == 1 for draw in made)
        drawn.append([draw[0].x_s.shape[1:] for draw in made])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_heads_take_every_size(name: str, folders: dict[str, Path]) -> None:
    """Of maps, and of videos; made for the larger size, they would not take the smaller."""
    tiny, folder = TINY_MODELS[name], folders[name]
    more = ["method.name=adm", "method.discriminator.width=16", "method.steps=1", "method.phases=1", "iterations=2"]
    own = two_sizes(recipe_family(recipe_of(tiny, folder)))
    recipe, _ = at_both(tiny, folder, own)
    recipe = bucket_recipe(tiny, folder, own, *more, f"seed={recipe.seed}", "optimizer.discriminator.lr=1e-3")
    family = recipe_family(recipe)
    table = PromptTable(str(recipe.prompts.path), family.condition_columns)
    run = train(recipe, family, family.load_teacher(), table)
    assert run.parts["discriminator"].updates == 2
    assert all(value.isfinite().all() for value in run.parts["discriminator"].state().values())


def test_heads_of_the_smallest_size_are_the_ones_that_fit_all() -> None:
    small, large = (8, 2, 4), (8, 16, 16)
    maps = [torch.randn(1, *shape) for shape in (small, large)]
    assert all(Heads([small], 16, 0)([each]).isfinite().all() for each in maps)
    with pytest.raises(RuntimeError):
        Heads([large], 16, 0)([maps[0]])


@pytest.mark.parametrize("method", ["dmd-sgts", "sid"])
def test_the_sizes_of_a_roles_batches_are_told(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """As metrics.jsonl has them: those that the updates are made on."""
    tiny, folder = TINY_MODELS["qwen_image"], folders["qwen_image"]
    sizes = two_sizes(recipe_family(recipe_of(tiny, folder)))
    more = [f"method.name={method}", "iterations=4", "method.fake_updates=2"]
    recipe = bucket_recipe(tiny, folder, sizes, *more)
    family = recipe_family(recipe)
    table = PromptTable(str(recipe.prompts.path), family.condition_columns)
    program = LocalProgram(build_method(recipe), family, family.load_teacher(), table)
    generator, trace, seen = program.parts["generator"], trace_method(recipe), []
    generator.start_phase(0, 0)
    shapes = Buckets(recipe, family).shapes
    for n in range(4):
        calls = [("rollout", (n, update), update) for update in range(2)] + [("propose", (n,), 2)]
        made = [getattr(generator, name)(*given, program.prompts(n, draw)[0]) for name, given, draw in calls]
        tensors = [each.x_s if name == "rollout" else each.x_t for each, (name, *_) in zip(made, calls, strict=True)]
        wanted = [sizes[shapes.index(tuple(tensor.shape[1:]))] for tensor in tensors]
        assert trace.buckets(n) == {"fake": wanted[:2], "generator": wanted[2:]}
        seen += wanted
    assert sizes[0] in seen and sizes[1] in seen
    assert trace_method(recipe_of(tiny, folder, *SGTS)).buckets(0) == {}


# What is refused.


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("qwen", "no list of buckets 'qwen'; did you mean 'qwen-image'?"),
        ("[]", "at least one size is needed"),
        ("[[64, 48], [64, 48]]", "prompts.buckets.1: [64, 48] is prompts.buckets.0 already"),
        ("[{size: [64, 48], weight: 0}]", "prompts.buckets.0: the weight of [64, 48] is 0; a number above 0"),
        ("[{size: [64, 48], weight: .nan}]", "the weight of [64, 48] is nan"),
        ("[{size: [64, 48], wieght: 1}]", "unknown key 'wieght'; did you mean 'weight'?"),
        ("[[64.0, 48]]", "prompts.buckets.0: [height, width] or [frames, height, width]"),
        ("[[-64, 48]]", "whole numbers above 0, not [-64, 48]"),
        ("[64, 48]", "prompts.buckets.0: [height, width] or"),
        ("7", "a list of sizes is needed, or a name: qwen-image"),
    ],
)
def test_what_is_no_list_of_sizes(value: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("ring", [f"prompts.buckets={value}"])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("wan", "[[9, 60, 48]]", "prompts.buckets.0: [9, 60, 48]: the sides 60 and 48 are not multiples of 16"),
        ("wan", "[[9, 60, 48]]", "the nearest that are: [64, 48]"),
        ("wan", "[[9, 64, 48], [8, 64, 48]]", "prompts.buckets.1: [8, 64, 48]: there is no video of 8 frames"),
        ("wan", "[[9, 64, 48], [8, 64, 48]]", "the nearest: 5 and 9"),
        ("wan", "[[64, 48], [9, 64, 48]]", "prompts.buckets.1: [9, 64, 48] is the size of prompts.buckets.0, [64, 48]"),
        ("wan", "[[9, 64, 48], [9, 64, 1024]]", "prompts.buckets.1: [9, 64, 1024]: "),  # more positions than it has
        ("wan", "[[5, 64, 48]]", "teacher.options.latent_shape: [4, 3, 8, 6]"),
        ("sdxl", "[[81, 64, 64]]", "family 'sdxl' makes pictures, not 81 frames; leave the frames out"),
        ("qwen_image", "[[5, 64, 64]]", "family 'qwen_image' makes pictures, not 5 frames"),
        ("edm", "[[16, 16]]", "family 'edm' makes samples of one size alone"),
    ],
)
def test_sizes_that_the_teacher_does_not_make(name: str, sizes: str, words: str, folders: dict[str, Path]) -> None:
    recipe = recipe_of(TINY_MODELS[name], folders[name], f"prompts.buckets={sizes}")
    with pytest.raises(UserError) as caught:
        check(recipe)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_dmd2s_real_pictures_are_of_the_batchs_size(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny, folder, real = TINY_MODELS["qwen_image"], folders["qwen_image"], tmp_path / "real"
    real.mkdir()
    rows, draw, lines = tiny.rows(3), np.random.default_rng(0), []
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(real / f"{number}.png")
        lines.append({"file_name": f"{number}.png", **{name: column[number].tolist() for name, column in rows.items()}})
    (real / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = two_sizes(recipe_family(recipe_of(tiny, folder)))
    dmd2 = ["method.name=dmd2", "method.phases=null", f"method.dmd2.pictures={real}", "method.discriminator.width=16"]
    recipe = bucket_recipe(tiny, folder, sizes, *dmd2)
    family = recipe_family(recipe)
    check(recipe)
    teacher = family.load_teacher()
    generator = ReferencedGenerator(recipe, family, teacher, plan_phases(recipe))
    generator.start_phase(0, 0)
    buckets, seen = Buckets(recipe, family), set()
    for iteration in range(6):
        made = generator.references(iteration, 0, PromptBatch(0, 1, {}))
        sized = buckets.family_of(iteration, 0)
        pictures = PictureFolder(real, sized.picture_shape, [], "key")
        each = [sized.encode_pixels(pictures.take(np.array([number]))) for number in range(3)]
        assert sum(torch.equal(made.x_s, latents) for latents in each) == 1
        seen.add(tuple(made.x_s.shape[1:]))
    assert seen == set(buckets.shapes)
    run = train(recipe, family, teacher, table_of(recipe, tiny, family, folder))
    assert all(value.isfinite().all() for value in run.experts[0].values())


def test_own_networks_and_pairs_have_no_buckets(folders: dict[str, Path]) -> None:
    for name in ("digits", "ring"):
        with pytest.raises(UserError, match=f"prompts.buckets.0: .*family '{name}' makes samples of one size alone"):
            check(load_recipe(name, ["prompts.buckets=[[28, 28]]"]))
    tiny, folder = TINY_MODELS["qwen_image"], folders["qwen_image"]
    sizes = two_sizes(recipe_family(recipe_of(tiny, folder)))
    check(bucket_recipe(tiny, folder, sizes))
    with pytest.raises(UserError, match="prompts.buckets: method 'dmd' trains on ODE pairs here"):
        check(bucket_recipe(tiny, folder, sizes, "method.name=dmd", "method.steps=1", "method.regression.weight=0.25"))


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_counts_of_frames_are_the_familys_own(name: str, folders: dict[str, Path]) -> None:
    family = TINY_MODELS[name].build(folders[name])
    width, height = family.picture_size
    assert family.sample_shape(family.frames, height, width) == tuple(family.latent_shape)
    for frames in (9, 17):
        assert family.resized(family.sample_shape(frames, height, width)).frames == frames


def test_the_lists_that_ship_fit_their_models() -> None:
    """By the models' own factors, which hold without their folders; and their previews' size is among them."""
    for name, family in {"qwen-image": "qwen_image", "wan-t2v": "wan", "sdxl": "sdxl"}.items():
        teacher = {"family": family, "path": None}
        recipe = parse_recipe(
            {"name": "x", "teacher": teacher, "method": {"name": "dmd-sgts"}, "prompts": {"buckets": name}}, "x"
        )
        built = recipe_family(recipe)
        shapes = Buckets(recipe, built).shapes
        assert len(set(shapes)) == len(shipped_buckets()[name]) and tuple(built.latent_shape) in shapes
        assert parse_recipe(json.loads(recipe.model_dump_json()), "x") == recipe  # a run's folder says the sizes
        assert isinstance(json.loads(recipe.model_dump_json())["prompts"]["buckets"], list)


# What is made afterwards.


def test_the_sizes_that_can_be_asked_for(folders: dict[str, Path]) -> None:
    tiny, folder = TINY_MODELS["wan"], folders["wan"]
    recipe = bucket_recipe(tiny, folder, [[1, 64, 64], [9, 64, 48], [9, 48, 64], [1, 48, 64]])
    sizes = trained_sizes(recipe, recipe_family(recipe))
    assert [size_words(each) for each in sizes] == ["48x64 of 9 frames", "64x64", "64x48 of 9 frames", "64x48"]
    assert choose_size(sizes, None, None) is sizes[0]
    assert choose_size(sizes, "64x48", None) is sizes[2] and choose_size(sizes, "64x64", None) is sizes[1]
    assert choose_size(sizes, "64x48", 1) is sizes[3] and choose_size(sizes, None, 1) is sizes[1]
    for wrong, words in ((("64x32", None), "--size 64x32: .*'64x64'"), (("large", None), "WIDTHxHEIGHT"),
                         (("48x64", 5), "--frames 5: .*48x64 of 9 frames")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            choose_size(sizes, *wrong)


def test_first_frames_are_of_the_batchs_size(folders: dict[str, Path]) -> None:
    tiny, folder = TINY_MODELS["wan_i2v"], folders["wan_i2v"]
    sizes = [[9, 64, 48], [9, 64, 64]]
    recipe = bucket_recipe(tiny, folder, sizes)
    family = recipe_family(recipe)
    assert family.condition_columns[-2:] == [bucket_column(size) for size in sizes]
    rows = table_of(recipe, tiny, family, folder).take(np.arange(2))
    conditions = family.conditions(rows)
    for sized in Buckets(recipe, family).families:
        own = sized.for_size(conditions)
        assert set(own) == {"prompt_embeds", "negative_prompt_embeds", IMAGE_COLUMN}
        assert own[IMAGE_COLUMN].shape[2:] == sized.latent_shape[1:]
    assert torch.equal(own[IMAGE_COLUMN], conditions[bucket_column(sizes[1])])
    with pytest.raises(UserError, match="no column 'image_latents_9x64x64'"):
        family.conditions({name: column for name, column in rows.items() if name != bucket_column(sizes[1])})
    short = {**rows, bucket_column(sizes[1]): rows[IMAGE_COLUMN]}
    with pytest.raises(UserError, match=r"column 'image_latents_9x64x64' is \[8, 3, 8, 6\] a row, not \[8, 3, 8, 8\]"):
        family.conditions(short)
