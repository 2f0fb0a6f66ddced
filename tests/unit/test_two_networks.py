"""A teacher of two networks (Wan 2.2 A14B): each sample by the network of its own t, as diffusers' pipeline has it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_every_family import inputs, moved, recipe_of

from raydmd.data.pair_shards import PairIndex, read_index
from raydmd.data.prompts import PromptTable
from raydmd.diffusion.solvers import euler_step
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.methods.pairs import pair_facts
from raydmd.models.experts import Experts, fuse_lora
from raydmd.models.features import read_features
from raydmd.models.fingerprint import fingerprint_teacher
from raydmd.models.tiny import TINY_MODELS
from raydmd.recipe_check import check
from raydmd.runs.run import recipe_family
from raydmd.sampling.student import sample_student
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

TINY = TINY_MODELS["wan22"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
ON_THE_BOUNDARY = ["method.boundaries=[0.875]", "method.steps=2", "method.times=[1, 0.875]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("two"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def by_hand(network: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return network(
        hidden_states=x, timestep=1000 * t.float(), encoder_hidden_states=prompt, return_dict=False
    )[0]  # fmt: skip


def test_each_sample_is_scored_by_the_network_of_its_t(folder: Path) -> None:
    family = TINY.build(folder)
    teacher = family.load_teacher()
    x, _, conditions = inputs(TINY, family)
    x, conditions = torch.cat([x, x[:1]]), {name: torch.cat([v, v[:1]]) for name, v in conditions.items()}
    t = torch.tensor([0.2, 0.875, 0.8749, 0.95], dtype=torch.float64)
    made, prompt = teacher(x, t, conditions), conditions["prompt_embeds"]
    high, low = (by_hand(network, x, t, prompt) for network in (teacher.transformer, teacher.transformer_2))
    wanted = torch.stack([low[0], high[1], low[2], high[3]])
    assert torch.allclose(made, wanted, atol=1e-6)
    assert moved(made, torch.stack([high[0], low[1], high[2], low[3]]))
    assert teacher.part_of(torch.tensor([0.9], dtype=torch.float64)).tolist() == [0]


def test_a_network_that_no_sample_needs_is_not_called(folder: Path) -> None:
    family = TINY.build(folder)
    teacher, called = family.load_teacher(), list[str]()
    for name in ("transformer", "transformer_2"):
        getattr(teacher, name).register_forward_hook(lambda module, given, output, name=name: called.append(name))
    x, _, conditions = inputs(TINY, family)
    for times, wanted in (
        ([0.9, 1.0, 0.95], ["transformer"]), ([0.1, 0.2, 0.8], ["transformer_2"]),
        ([0.1, 0.9, 0.2], ["transformer", "transformer_2"]),
    ):  # fmt: skip
        called.clear()
        teacher(x, torch.tensor(times, dtype=torch.float64), conditions)
        assert called == wanted


def test_both_are_loaded_with_the_teachers_options(folder: Path) -> None:
    teacher = TINY.build(folder, dtype="bfloat16", gradient_checkpointing=True).load_teacher()
    for network in (teacher.transformer, teacher.transformer_2):
        assert network.dtype == torch.bfloat16 and network.is_gradient_checkpointing
    single = TINY.build(folder, subfolder="transformer_2").load_teacher()
    assert single.part_of(torch.ones(1)) is None
    assert torch.equal(single.transformer.proj_out.weight.bfloat16(), teacher.transformer_2.proj_out.weight)
    assert {name.partition(".")[0] for name in teacher.state_dict()} == {"transformer", "transformer_2"}


class Trajectory:
    """A pipeline's callback that keeps the latents after every step."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []

    def __call__(self, pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        self.latents.append(given["latents"].clone())
        return given


def test_steps_above_and_below_the_boundary_are_the_pipelines(folder: Path) -> None:
    rows = TINY.rows(2)
    recipe = recipe_of(TINY, folder, "teacher.guidance_scale=[4, 2.5]")
    family = recipe_family(recipe)
    check(recipe)
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    kept, pipeline = Trajectory(), TINY.pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = TINY.call(rows, noise, 4.0, 4)
    with torch.no_grad():
        pipeline(**call, guidance_scale_2=2.5, output_type="latent", callback_on_step_end=kept)
    times, x, conditions = family.teacher_times(4), [noise, *kept.latents], family.conditions(rows)
    assert times[1] > 0.875 > times[2]
    scorer = Scorer(recipe, family, family.load_teacher())
    swapped = Scorer(recipe_of(TINY, folder, "teacher.guidance_scale=[2.5, 4]"), family, scorer.network)

    def step(scorer: Scorer, k: int, *scale: float) -> torch.Tensor:
        prediction = scorer.predict(x[k], torch.full((2,), times[k], dtype=torch.float64), conditions, *scale)
        return euler_step(family.schedule, prediction, x[k], times[k], times[k + 1], family.prediction)

    for k, scale in enumerate((4.0, 4.0, 2.5, 2.5)):
        assert (step(scorer, k) - x[k + 1]).abs().max() <= 1e-5
        assert (step(swapped, k, scale) - x[k + 1]).abs().max() <= 1e-5  # a request's number is that of both
        assert moved(step(swapped, k), x[k + 1])


def test_a_mixed_batch_has_the_scale_of_each_sample(folder: Path) -> None:
    recipe = recipe_of(TINY, folder, "teacher.guidance_scale=[4, 2]")
    family = recipe_family(recipe)
    scorer = Scorer(recipe, family, family.load_teacher())
    x, t, conditions = inputs(TINY, family)  # the last t is above the boundary
    made = scorer.predict(x, t, conditions)
    high, low = (scorer.predict(x, t, conditions, scale) for scale in (4.0, 2.0))
    assert torch.allclose(made, torch.cat([low[:2], high[2:]]), atol=1e-6)
    assert moved(made, torch.cat([high[:2], low[2:]]))


def test_features_are_those_of_each_samples_network(folder: Path) -> None:
    family = TINY.build(folder)
    teacher = family.load_teacher()
    x, t, conditions = inputs(TINY, family)
    names = list(teacher.feature_blocks())
    prediction, features = read_features(teacher, names, x, t, conditions)
    assert torch.allclose(prediction, teacher(x, t, conditions), atol=1e-6)
    parts = [read_features(part, names, x, t, conditions)[1] for part in teacher.parts]
    for feature, high, low in zip(features, *parts, strict=True):
        assert feature.shape == (3, *teacher.feature_shape(family.latent_shape))
        assert torch.allclose(feature, torch.cat([low[:2], high[2:]]), atol=1e-5)
        assert moved(feature, torch.cat([high[:2], low[2:]]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_expert_on_one_side_has_one_network(kind: str, folder: Path) -> None:
    recipe = recipe_of(TINY, folder, *ON_THE_BOUNDARY, f"method.experts.kind={kind}")
    family = recipe_family(recipe)
    prompts = PromptTable(str(recipe.prompts.path), family.condition_columns)
    one = train(recipe, family, family.load_teacher(), prompts)
    generator = one.parts["generator"]
    for index, (own, expert) in enumerate(zip(("transformer", "transformer_2"), one.experts, strict=True)):
        assert {name.partition(".")[0] for name in expert} == {own}
        if kind == "lora":
            assert f'"{own}.lora_alpha": 8.0' in generator.experts.metadata(index)["lora_adapter_metadata"]
            assert any(value.any() for name, value in expert.items() if name.endswith("lora_B.weight"))
    assert {name.partition(".")[0] for name, _ in one.parts["fake"].network.named_parameters()} == {
        "transformer", "transformer_2",
    }  # fmt: skip
    conditions = family.conditions(prompts.take(np.arange(2)))
    made = sample_student(family, generator.experts, generator.phases, conditions, 2, seed=1).latents
    assert made.shape == (2, *family.latent_shape) and made.isfinite().all()
    loaded, t = family.load_teacher(), torch.full((2,), 0.875, dtype=torch.float64)
    x, low = torch.randn(2, *family.latent_shape), loaded.for_interval(*generator.phases[1].interval)
    if kind == "lora":  # as served: merged into the second network alone
        low = fuse_lora(low, one.experts[1], 4, 8.0)
    else:
        low.load_state_dict(one.experts[1])
    wanted = generator.experts.expert(1)(x, t, conditions)
    assert torch.allclose(low(x, t, conditions), wanted, atol=1e-5)
    assert moved(wanted, loaded.parts[0](x, t, conditions))


def test_an_expert_across_the_boundary_has_both(folder: Path) -> None:
    family = TINY.build(folder)
    teacher = family.load_teacher()
    for intervals in (None, [(1.0, 0.5)]):
        experts = Experts(teacher, 1, "lora", 2, 2.0, family.lora_targets, intervals=intervals)
        experts.start(0)
        assert {name.partition(".")[0] for name in experts.state(0)} == {"transformer", "transformer_2"}
    assert teacher.for_interval(0.9, 0.875) is teacher.parts[0]
    assert teacher.for_interval(0.875, 0.0) is teacher.parts[1]
    assert teacher.for_interval(0.9, 0.85) is teacher


def test_the_fingerprint_covers_both(folder: Path, copy: Path) -> None:
    before = fingerprint_teacher(TINY.build(folder))
    assert fingerprint_teacher(TINY.build(copy)) == before
    assert fingerprint_teacher(TINY.build(copy, subfolder="transformer")) != before
    file = copy / "transformer_2" / WEIGHTS
    tensors = load_file(file)
    save_file({name: value + 1e-3 for name, value in tensors.items()}, file)
    assert fingerprint_teacher(TINY.build(copy)) != before


def test_pairs_are_of_both_scales(folder: Path, tmp_path: Path) -> None:
    one, two = (recipe_of(TINY, folder, f"teacher.guidance_scale={scale}") for scale in ("4", "[4, 3]"))
    facts = [pair_facts(recipe, recipe_family(recipe), None) for recipe in (one, two)]
    index = PairIndex(facts[1], 4)
    (tmp_path / "pairs.json").write_text(index.text())
    assert read_index(tmp_path) == index
    assert facts[0].difference(facts[1]) == "teacher.guidance_scale: (4.0, 3.0) there, 4 here"


def test_one_line_says_what_is_wrong(copy: Path) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(UserError, match=words) as error:
            TINY.build(copy, **options).load_teacher()
        assert "\n" not in str(error.value)

    edit(copy / "transformer_2" / "config.json", eps=1e-5)
    refused("transformer_2/config.json has eps 1e-05, but the first transformer has 1e-06")
    edit(copy / "transformer_2" / "config.json", eps=1e-6)
    (copy / "transformer_2" / WEIGHTS).rename(copy / "weights")
    refused("transformer_2 has no weights")
    TINY.build(copy, subfolder="transformer").load_teacher()
    (copy / "transformer_2" / "config.json").rename(copy / "config")
    refused("has two transformers by its model_index.json, but no transformer_2/config.json")
    for ratio in (None, "0.9", 1.5):
        edit(copy / "model_index.json", boundary_ratio=ratio)
        refused(f"has two transformers, but .* boundary_ratio {ratio!r}, .*subfolder: transformer or transformer_2")


def test_two_scales_are_for_two_networks(folder: Path) -> None:
    words = "teacher.guidance_scale: two numbers are for a teacher of two networks"
    override = "teacher.options.subfolder=transformer"
    with pytest.raises(UserError, match=words):
        check(recipe_of(TINY, folder, "teacher.guidance_scale=[4, 3]", override))
    with pytest.raises(UserError, match=f"{words}.*family 'digits'"):
        check(load_recipe("digits", ["teacher.guidance_scale=[4, 3]"]))
    with pytest.raises(UserError, match="teacher.guidance_scale: 0.5 would distil"):
        check(recipe_of(TINY, folder, "teacher.guidance_scale=[4, 0.5]"))


def test_one_network_of_a_pipeline_of_two_has_no_boundary(folder: Path) -> None:
    assert isinstance(TINY.build(folder, subfolder="transformer").load_teacher().network, WanTransformer3DModel)
    assert TINY.build(folder).outline().boundary == 0.875
