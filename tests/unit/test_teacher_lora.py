"""A teacher's LoRA: held against diffusers' own loader, in every form of file; what does not fit is refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from raydmd.data.prompts import write_prompts
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.models.base import Family
from raydmd.models.fingerprint import fingerprint_teacher
from raydmd.models.tiny import TINY_MODELS
from raydmd.recipe_check import absolute, check
from raydmd.runs.run import recipe_family

torch.set_num_threads(1)

TARGETS = ["to_q", "to_v"]
NAMES = ["qwen_image", "wan"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: TINY_MODELS[name].save(tmp_path_factory.mktemp(name)) for name in NAMES}


def adapters(folder: Path, name: str, **more: Any) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return random adapters as PEFT names them, and their settings."""
    family = TINY_MODELS[name].build(folder)
    network = getattr(diffusers, family.network_class).from_pretrained(folder / "transformer")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **more)
    network.add_adapter(config)
    draw = torch.Generator().manual_seed(0)
    state = {key: 0.2 * torch.randn(value.shape, generator=draw) for key, value in
             sorted(get_peft_model_state_dict(network).items())}  # fmt: skip
    return state, config


def diffusers_file(folder: Path, name: str, to: Path, **more: Any) -> Path:
    state, config = adapters(folder, name, **more)
    kind = getattr(diffusers, TINY_MODELS[name].build(folder).pipeline_class)
    said = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    kind.save_lora_weights(to, transformer_lora_layers=state, transformer_lora_adapter_metadata=said)
    return to


def by_diffusers(folder: Path, name: str, lora: Path) -> dict[str, torch.Tensor]:
    """Return the weights after diffusers' own loader has fused a file."""
    family = TINY_MODELS[name].build(folder)
    network = getattr(diffusers, family.network_class).from_pretrained(folder / "transformer")
    parts = {part: None for part in ("tokenizer", "text_encoder", "vae")}
    pipeline = getattr(diffusers, family.pipeline_class)(
        **parts, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=network
    )
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return network.state_dict()


def with_lora(folder: Path, name: str, lora: Path, **options: Any) -> Family:
    family = TINY_MODELS[name].build(folder, **options)
    family.use_lora(str(lora))
    return family


def weights(family: Family) -> dict[str, torch.Tensor]:
    family.check_teacher()
    return family.load_teacher().network.state_dict()


def near(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_diffusers_fuses(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[name]
    lora = diffusers_file(folder, name, tmp_path / "lora", alpha_pattern={"to_v": 1.5}, rank_pattern={"to_v": 2})
    found = weights(with_lora(folder, name, lora))
    assert near(found, by_diffusers(folder, name, lora))
    assert not near(found, weights(TINY_MODELS[name].build(folder)))
    plain = tmp_path / "plain.safetensors"  # without what it says of alpha, alpha is the rank
    save_file(load_file(lora / "pytorch_lora_weights.safetensors"), plain)
    other = weights(with_lora(folder, name, plain))
    assert near(other, by_diffusers(folder, name, plain)) and not near(other, found)


def test_pefts_own_form(folders: dict[str, Path], tmp_path: Path) -> None:
    state, config = adapters(folders["wan"], "wan", alpha_pattern={"to_v": 1.5})
    save_file(
        {f"base_model.model.{key}": value for key, value in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 6
    same = diffusers_file(folders["wan"], "wan", tmp_path / "same", alpha_pattern={"to_v": 1.5})
    assert near(weights(with_lora(folders["wan"], "wan", tmp_path)), weights(with_lora(folders["wan"], "wan", same)))


def test_another_trainers_form(folders: dict[str, Path], tmp_path: Path) -> None:
    """Names of kohya's, with an alpha a layer."""
    state, _ = adapters(folders["qwen_image"], "qwen_image")
    flat: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        layer, part = key.rsplit(".lora_", 1)
        stem = f"lora_unet_{layer.replace('.', '_')}"
        flat[f"{stem}.{'lora_down' if part.startswith('A') else 'lora_up'}.weight"] = value
        flat[f"{stem}.alpha"] = torch.tensor(6.0)
    save_file(flat, tmp_path / "kohya.safetensors")
    same = diffusers_file(folders["qwen_image"], "qwen_image", tmp_path / "same")
    found = weights(with_lora(folders["qwen_image"], "qwen_image", tmp_path / "kohya.safetensors"))
    assert near(found, weights(with_lora(folders["qwen_image"], "qwen_image", same)))


def test_a_teacher_of_half_precision_is_rounded_once(folders: dict[str, Path], tmp_path: Path) -> None:
    lora = diffusers_file(folders["wan"], "wan", tmp_path / "lora")
    whole = weights(with_lora(folders["wan"], "wan", lora))
    half = weights(with_lora(folders["wan"], "wan", lora, dtype="bfloat16"))
    plain = weights(TINY_MODELS["wan"].build(folders["wan"], dtype="bfloat16"))
    layer = "blocks.0.attn1.to_q.weight"
    assert half[layer].dtype == torch.bfloat16 and not torch.equal(half[layer], plain[layer])
    delta = whole[layer] - weights(TINY_MODELS["wan"].build(folders["wan"]))[layer]
    assert torch.equal(half[layer], (plain[layer].float() + delta).bfloat16())


def recipe(folder: Path, lora: Path | str | None, *overrides: str) -> Any:
    tiny = TINY_MODELS["wan"]
    if not (folder / "prompts.parquet").is_file():
        write_prompts(folder / "prompts.parquet", tiny.rows(3))
    (folder / "tiny.yaml").write_text(
        f"teacher: {{family: wan, path: {folder}, options: {dict(tiny.options)}}}\n"
        f"prompts: {{path: {folder}/prompts.parquet}}\nmethod: {{name: phased, experts: {{kind: lora, rank: 2}}}}\n"
    )
    return load_recipe(str(folder / "tiny.yaml"), [f"teacher.lora={'null' if lora is None else lora}", *overrides])


def test_a_recipe_names_it_and_it_is_part_of_the_fingerprint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["wan"]
    lora = diffusers_file(folder, "wan", tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    named = absolute(recipe(folder, "lora"))
    assert named.teacher.lora == str(lora) and check(named) == []
    plain, tuned = recipe_family(recipe(folder, None)), recipe_family(named)
    assert not near(tuned.load_teacher().network.state_dict(), plain.load_teacher().network.state_dict())
    moved = shutil.copytree(lora, tmp_path / "moved")
    prints = [fingerprint_teacher(recipe_family(recipe(folder, each))) for each in (None, lora, moved)]
    assert prints[1] == prints[2] != prints[0]
    file = moved / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    save_file({name: value * 1.01 for name, value in state.items()}, file)
    assert fingerprint_teacher(recipe_family(recipe(folder, moved))) != prints[1]


def spoilt(folders: dict[str, Path], to: Path, what: str) -> Path:
    lora = diffusers_file(folders["wan"], "wan", to)
    file = lora / "pytorch_lora_weights.safetensors"
    state, first = load_file(file), "transformer.blocks.0.attn1.to_q"
    if what == "another model":
        return diffusers_file(folders["qwen_image"], "qwen_image", to / "other")
    if what == "a layer more":
        state |= {f"transformer.blocks.7.to_q.lora_{part}.weight": torch.ones(3, 3) for part in "AB"}
    elif what == "a shape":
        state[f"{first}.lora_A.weight"] = torch.ones(3, 25)
    elif what == "two ranks":
        state[f"{first}.lora_B.weight"] = torch.ones(24, 4)
    elif what == "half a pair":
        del state[f"{first}.lora_B.weight"]
    elif what == "DoRA":
        state[f"{first}.lora_magnitude_vector"] = torch.ones(24)
    elif what == "a text encoder":
        state["text_encoder.layers.0.q.lora_A.weight"] = torch.ones(3, 4)
    elif what == "cut short":
        file.write_bytes(file.read_bytes()[:-8])
        return file
    save_file(state, file)
    return file


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another model", "matches no layer of the teacher's WanTransformer3DModel, e.g. 'transformer_blocks.0.attn"),
        ("a layer more", "has 1 layers that the teacher's WanTransformer3DModel has not, e.g. 'blocks.7.to_q'"),
        ("a shape", "'blocks.0.attn1.to_q' is for a weight of [24, 25], but the teacher's is [24, 24]"),
        ("two ranks", "'blocks.0.attn1.to_q' has lora_A [3, 24] and lora_B [24, 4], which are of two ranks"),
        ("half a pair", "'blocks.0.attn1.to_q.lora_A.weight' that is not one of a pair of lora_A and lora_B"),
        ("DoRA", "is of DoRA ("),
        ("a text encoder", "changes the text encoder, too ('text_encoder.layers.0.q.lora_A.weight')"),
        ("cut short", "is not readable as a safetensors file"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(
    folders: dict[str, Path], tmp_path: Path, what: str, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(recipe(folders["wan"], spoilt(folders, tmp_path, what)))
    told = str(caught.value)
    assert told.startswith("teacher.lora: ") and words in told and "\n" not in told


def test_what_is_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"two/{name}.safetensors").write_bytes(b"x")
    for path, words in (
        ("empti", "no file or folder"), ("empty", "has no safetensors file"), ("weights.bin", "may hold code"),
        ("two", "has 2 safetensors files; name one of a.safetensors, b.safetensors"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="teacher.lora: ") as caught:
            check(recipe(folders["wan"], tmp_path / path))
        assert words in str(caught.value)
    with pytest.raises(UserError, match="teacher.lora: family 'ring' takes none"):
        check(load_recipe("ring", ["teacher.lora=x"]))
