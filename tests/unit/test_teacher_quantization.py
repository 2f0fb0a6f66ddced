"""A teacher in 8 bits: near the original, the same bits each time, and used by what scores alone."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_family import inputs, recipe_of

from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import Reference, train
from raydmd.methods.pairs import pair_facts
from raydmd.methods.teacher_quantization import differentiates_through_teacher
from raydmd.models.diffusers import quantization
from raydmd.models.diffusers.quantization import (
    diffusers_networks,
    layers_to_quantize,
    quantized_copy,
    savings,
    weight_bytes,
)
from raydmd.models.fingerprint import fingerprint_teacher, same_teacher
from raydmd.models.tiny import TINY_MODELS
from raydmd.recipe_check import check, check_offline
from raydmd.runs.run import recipe_family
from raydmd.runtime.resume_rules import check_same_run
from raydmd.training.score_network import vector_jacobian
from raydmd.training.teacher import Scorer

torch.set_num_threads(1)

NAMES = ["qwen_image", "sdxl", "wan22"]
BOUND = {"qwen_image": 0.002, "sdxl": 0.02, "wan22": 0.01}  # of a prediction's norm; 0.0005, 0.0046, 0.0018 were seen
INT8, FP8 = "teacher.quantization=int8", "teacher.quantization=fp8"
GPU = ("runtime.teacher.gpus=1", "teacher.options.dtype=bfloat16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: TINY_MODELS[name].save(tmp_path_factory.mktemp(name)) for name in [*NAMES, "edm"]}


def scorer(name: str, folders: dict[str, Path], *overrides: str) -> Scorer:
    recipe = recipe_of(TINY_MODELS[name], folders[name], *overrides)
    family = recipe_family(recipe)
    return Scorer(recipe, family, family.load_teacher())


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def quantized_weights(of: Scorer) -> list[Any]:
    return [p for network in diffusers_networks(of.network) for p in network.parameters() if hasattr(p, "qdata")]


@pytest.mark.parametrize("name", NAMES)
def test_a_guided_prediction_and_its_derivative_move_little(name: str, folders: dict[str, Path]) -> None:
    exact, near = scorer(name, folders), scorer(name, folders, INT8)
    x, t, conditions = inputs(TINY_MODELS[name], exact.family)
    wanted, found = (each.predict(x, t, conditions) for each in (exact, near))
    assert 0 < distance(found, wanted) < BOUND[name]
    assert torch.equal(scorer(name, folders, INT8).predict(x, t, conditions), found)  # the same bits each time
    slopes = [vector_jacobian(lambda x, of=of: of.predict(x, t, conditions), x, wanted) for of in (exact, near)]
    assert 0 < distance(slopes[1], slopes[0]) < BOUND[name]
    assert all(p.grad is None for p in near.network.parameters())
    for weight in quantized_weights(near):
        weight.scale.mul_(1.5)  # negative control: a wrong scale
    assert distance(near.predict(x, t, conditions), wanted) > BOUND[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_quantized_and_what_that_saves(name: str, folders: dict[str, Path]) -> None:
    family = TINY_MODELS[name].build(folders[name])
    family.use_quantization("int8")
    teacher = family.load_teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    scoring = family.scoring_network(teacher, torch.device("cpu"))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    told = savings(diffusers_networks(teacher), "int8")
    assert told.before == weight_bytes(diffusers_networks(teacher)) > told.after
    assert told.after == weight_bytes(diffusers_networks(scoring))
    assert family.quantization_note() == told.describe("int8")
    for network, original in zip(diffusers_networks(scoring), diffusers_networks(teacher), strict=True):
        chosen = layers_to_quantize(original, "int8")
        made = [key.removesuffix(".weight") for key, p in network.named_parameters() if hasattr(p, "qdata")]
        assert sorted(made) == sorted(chosen) and chosen
        shared = {p.data_ptr() for p in original.parameters()}
        assert not any(p.data_ptr() in shared for p in network.parameters() if not hasattr(p, "qdata"))


def test_what_is_sensitive_stays(folders: dict[str, Path]) -> None:
    said = {
        "qwen_image": ("transformer_blocks.0.attn.to_q transformer_blocks.1.img_mlp.net.2 "
                       "transformer_blocks.0.img_mod.1",
                       "img_in txt_in time_text_embed.timestep_embedder.linear_1 norm_out.linear proj_out"),
        "wan22": ("blocks.0.attn1.to_q blocks.1.ffn.net.2",
                  "condition_embedder.time_proj condition_embedder.text_embedder.linear_1 proj_out"),
        "sdxl": ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q "
                 "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
                 "time_embedding.linear_1 add_embedding.linear_1 down_blocks.0.resnets.0.time_emb_proj"),
    }  # fmt: skip
    for name, (inside, outside) in said.items():
        network = diffusers_networks(TINY_MODELS[name].build(folders[name]).outline())[0]
        chosen, there = set(layers_to_quantize(network, "int8")), dict(network.named_modules())
        assert set(inside.split()) <= chosen and not set(outside.split()) & chosen
        assert all(isinstance(there[layer], torch.nn.Linear) for layer in (*inside.split(), *outside.split()))
    network = diffusers_networks(TINY_MODELS["wan22"].build(folders["wan22"]).outline())[0]
    network._keep_in_fp32_modules = [*network._keep_in_fp32_modules, "attn1"]
    assert not any(".attn1." in layer for layer in layers_to_quantize(network, "int8"))


def run(name: str, folders: dict[str, Path], *overrides: str, iterations: int | None = None) -> Reference:
    recipe = recipe_of(TINY_MODELS[name], folders[name], *overrides)
    family = recipe_family(recipe)
    prompts = PromptTable(str(recipe.prompts.path), family.condition_columns)
    return train(recipe, family, family.load_teacher(), prompts, iterations=iterations)


@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
def test_a_run_is_the_same_bits_again(name: str, folders: dict[str, Path]) -> None:
    one, again, plain = (run(name, folders, *more).experts for more in ((INT8,), (INT8,), ()))
    assert len(one) == 2 and all(torch.equal(each[k], other[k]) for each, other in zip(one, again, strict=True)
                                 for k in each)  # fmt: skip
    assert any(not torch.equal(each[k], other[k]) for each, other in zip(one, plain, strict=True) for k in each)


def test_what_is_trained_starts_from_the_teachers_own_weights(folders: dict[str, Path]) -> None:
    loaded = TINY_MODELS["qwen_image"].build(folders["qwen_image"]).load_teacher().state_dict()
    parts = run("qwen_image", folders, INT8, "method.name=adm", "method.experts.kind=full", iterations=0).parts
    expert = parts["generator"].experts.networks["0"]
    for network in (parts["fake"].network, expert, parts["discriminator"].backbone):
        assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())
    assert quantized_weights(parts["teacher"])


@pytest.mark.parametrize("method", ["adm", "sid"])
def test_methods_that_differentiate(method: str, folders: dict[str, Path]) -> None:
    done = run("qwen_image", folders, INT8, f"method.name={method}", "method.phases=1", "iterations=1")
    assert all(value.isfinite().all() for expert in done.experts for value in expert.values())
    assert any(value.any() for value in done.experts[0].values())


def test_the_arithmetic_of_fp8(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's CPUs have the product, too, if slow: what torchao and this project ask of a GPU is left out."""
    monkeypatch.setattr(quantization, "check_device", lambda kind, device: None)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularities: None)
    tiny = TINY_MODELS["qwen_image"]
    family = tiny.build(folders["qwen_image"], dtype="bfloat16")
    teacher = family.load_teacher()
    x, t, conditions = inputs(tiny, family)
    near = quantized_copy(teacher, "fp8", torch.device("cpu"))
    found, wanted = near(x, t, conditions), teacher(x, t, conditions)
    assert 0 < distance(found, wanted) < 0.02
    with pytest.raises(RuntimeError, match="derivative"):
        vector_jacobian(lambda x: near(x, t, conditions), x, wanted)
    told = savings(diffusers_networks(teacher), "fp8")
    assert told.after == weight_bytes(diffusers_networks(near)) < told.before
    alone = near(x[1:2], t[1:2], {key: value[1:2] for key, value in conditions.items()})
    assert torch.allclose(alone, found[1:2], atol=1e-2 * float(found.abs().max()))  # no scale is the batch's
    for network in diffusers_networks(near):
        for parameter in network.parameters():
            if hasattr(parameter, "qdata"):
                parameter.scale.mul_(1.3)
    assert distance(near(x, t, conditions), wanted) > 0.02  # negative control: a wrong scale


def test_the_fingerprint_says_it_and_a_resume_with_another_is_refused(folders: dict[str, Path]) -> None:
    tiny, folder = TINY_MODELS["qwen_image"], folders["qwen_image"]
    plain, eight = recipe_of(tiny, folder), recipe_of(tiny, folder, INT8)
    one, other = (fingerprint_teacher(recipe_family(each)) for each in (plain, eight))
    assert other == f"{one}-int8" and not same_teacher(one, other) and same_teacher(other, f"{other}@commit")
    assert pair_facts(eight, recipe_family(eight), None).teacher == other
    check_same_run(eight, eight, "--out x", lambda: 0)
    with pytest.raises(UserError, match=r"another recipe \(teacher.quantization: int8 there, none here\)"):
        check_same_run(eight, plain, "--out x", lambda: 0)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("qwen_image", [FP8, "teacher.options.dtype=bfloat16"], "runtime.teacher.gpus: 0 gives the teacher none"),
        ("qwen_image", [FP8, *GPU, "runtime.device=cpu"], "runtime.device: cpu gives the teacher none"),
        ("qwen_image", [FP8, "runtime.teacher.gpus=1"], "fp8 needs teacher.options.dtype: bfloat16, not float32"),
        ("qwen_image", [FP8, *GPU, "method.name=sid"], "method 'sid' differentiates through the teacher"),
        ("wan22", [FP8, *GPU], "the teacher's WanTransformer3DModel has no linear layer of sizes that 16 divides"),
        ("edm", [INT8], "family 'edm' takes none"),
    ],
)
def test_refused_before_a_run(folders: dict[str, Path], name: str, overrides: list[str], words: str) -> None:
    recipe = recipe_of(TINY_MODELS[name], folders[name], *overrides)
    for told in (check, check_offline):
        with pytest.raises(UserError) as caught:
            told(recipe)
        message = str(caught.value)
        assert message.startswith("teacher.quantization: ") and words in message and "\n" not in message


def test_other_families_and_kinds(folders: dict[str, Path]) -> None:
    for family in ("digits", "ring"):
        with pytest.raises(UserError, match=f"teacher.quantization: family '{family}' takes none"):
            check(load_recipe(family, [INT8]))
    with pytest.raises(UserError, match="teacher.quantization.*'none', 'int8' or 'fp8'.*int4"):
        load_recipe("digits", ["teacher.quantization=int4"])


def test_a_machine_without_what_it_needs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(TINY_MODELS["qwen_image"], folders["qwen_image"], INT8)
    assert any(line.startswith("teacher.quantization: int8 for ") for line in check_offline(recipe))
    with pytest.raises(UserError, match="teacher.quantization: fp8 needs a GPU .* would be on cpu; int8 runs there"):
        scorer("qwen_image", folders, FP8, *GPU)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for there, words in ((missing, "needs torchao, which is not installed"), (lambda name: "0.9.1", "0.18 or newer")):
        monkeypatch.setattr(quantization, "version", there)
        for refused in (lambda: check(recipe), lambda: scorer("qwen_image", folders, INT8)):
            with pytest.raises(UserError, match=f"teacher.quantization: it .*{words}"):
                refused()


def test_which_methods_differentiate_through_the_teacher(folders: dict[str, Path]) -> None:
    tiny, folder = TINY_MODELS["qwen_image"], folders["qwen_image"]
    found = {
        name: differentiates_through_teacher(recipe_of(tiny, folder, f"method.name={name}"), tiny.build(folder))
        for name in ("phased", "dmd2", "tdm", "sid", "adm")
    }
    assert found == {"phased": False, "dmd2": False, "tdm": False, "sid": True, "adm": False}
