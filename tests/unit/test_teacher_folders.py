"""Teachers' folders of diffusers: used whole or refused in a line, by configs and headers alone."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families_diffusers import CLASSES, CONFIGS, SHAPES, WIDTH, rows

from raydmd.data.prompts import write_prompts
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.registry import build_family
from raydmd.recipe_check import check

NAME = "diffusion_pytorch_model.safetensors"
PIPELINES = {"wan": "WanPipeline", "qwen_image": "QwenImagePipeline"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """A pipeline's folder of each family: model_index.json and transformer/."""
    return {name: new(tmp_path_factory.mktemp(name) / "teacher", name) for name in CLASSES}


def new(folder: Path, name: str, config: dict | None = None, **saving) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLASSES[name](**{**CONFIGS[name], **(config or {})}).save_pretrained(folder / "transformer", **saving)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[name]}))
    return folder


@pytest.fixture
def copies(plain: dict[str, Path], tmp_path: Path):
    return lambda name: Path(shutil.copytree(plain[name], tmp_path / "teacher"))


def family(name: str, folder: Path, **options) -> PretrainedFamily:
    made = build_family(name, str(folder), {"latent_shape": SHAPES[name], **options})
    assert isinstance(made, PretrainedFamily)
    return made


def refused(words: str, name: str, folder: Path, **options) -> None:
    """Both by the driver's check and by whoever loads it."""
    for what in ("check_teacher", "load_teacher"):
        with pytest.raises(UserError, match=words) as error:
            getattr(family(name, folder, **options), what)()
        assert "\n" not in str(error.value) and str(error.value).startswith("teacher.")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(folder: Path, change) -> None:
    file = folder / "transformer" / NAME
    save_file(change(load_file(file)), file, {"format": "pt"})


def to_fp8(tensors, scaled):
    made = {}
    for name, value in tensors.items():
        if value.ndim != 2:
            made[name] = value
            continue
        scale = value.abs().max() / 448 if scaled else torch.tensor(1.0)
        made[name] = (value / scale).to(torch.float8_e4m3fn)
        if scaled:
            made[name.replace(".weight", ".scale_weight")] = scale.reshape(())
    return made


def scaled_in_bfloat16(tensors):
    """The weights are widened, and their scales are left beside them."""
    return {name: value.bfloat16() if value.dtype == torch.float8_e4m3fn else value
            for name, value in to_fp8(tensors, True).items()}  # fmt: skip


def without(tensors, part):
    return {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, ".ffn."), r"lacks 8 of the \d+ tensors of the WanTransformer3DModel.*'blocks.0.ffn"),
        (lambda t: without(t, "proj_out.bias"), "lacks 1 of the .* 'proj_out.bias'"),
        (lambda t: {f"model.{name}": value for name, value in t.items()}, "every tensor's name begins with 'model.'"),
        (lambda t: {f"module.net.{name}": value for name, value in t.items()}, "begins with 'module.net.'"),
        (lambda t: {**t, "blocks.7.extra": torch.zeros(2)}, "has 1 tensors that .* has not, e.g. 'blocks.7.extra'"),
        (lambda t: {**t, "proj_out.bias": torch.zeros(5)}, r"'proj_out.bias' in .* is \[5\], but \[16\] by its config"),
        (lambda t: to_fp8(t, False), "is of F8_E4M3, a quantized format"),
        (lambda t: to_fp8(t, True), "scaled fp8 .*scale_weight"),
        (scaled_in_bfloat16, "scaled fp8 .*scale_weight"),
        (lambda t: {**t, "proj_out.bias": torch.zeros(16, dtype=torch.int8)}, "is of I8, a quantized format"),
        (lambda t: {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, "and has 1 others, e.g. 'blocks.0.self_attn"),
    ],
)
def test_weights_that_do_not_fit_the_config(copies, change, words: str) -> None:
    folder = copies("wan")
    rewrite(folder, change)
    refused(words, "wan", folder)


def test_what_diffusers_itself_leaves_out_is_left_out(copies) -> None:
    folder = copies("wan")
    rewrite(folder, lambda t: {**t, "blocks.0.attn2.norm_added_q.weight": torch.zeros(2)})
    family("wan", folder).load_teacher()


def break_file(folder: Path, content) -> None:
    file = folder / "transformer" / NAME
    file.write_bytes(content(file.read_bytes()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: break_file(f, lambda content: content[: len(content) // 2]), "cut short"),
        (lambda f: break_file(f, lambda _: b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda f: (f / "transformer" / NAME).rename(f / "transformer/model.safetensors"), "diffusers' name is"),
        (lambda f: (f / "transformer" / NAME).unlink(), "has no weights"),
        (lambda f: (f / "transformer" / NAME).rename(f / "transformer/Wan-Q4_K_M.gguf"), "weights in Wan-Q4_K_M.gguf"),
        (
            lambda f: edit(f / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes"}),
            r"quantization_config \(bitsandbytes\)",
        ),
        (lambda f: edit(f / "transformer/config.json", num_layers="two"), "makes no WanTransformer3DModel"),
        (lambda f: edit(f / "transformer/config.json", _class_name="WanModel"), "is of a WanModel"),
        (lambda f: edit(f / "transformer/config.json", _class_name="WanVACETransformer3DModel"), "is of a WanVACE"),
        (lambda f: (f / "transformer/config.json").write_text("[]"), "not a diffusers model's config"),
        (lambda f: (f / "model_index.json").write_text("{"), "not a diffusers model's config"),
    ],
)
def test_files_that_are_not_what_they_should_be(copies, spoil, words: str) -> None:
    folder = copies("wan")
    spoil(folder)
    refused(words, "wan", folder)


def test_shards_are_all_there_or_it_is_said_which_is_not(tmp_path: Path) -> None:
    folder = new(tmp_path / "sharded", "wan", max_shard_size="20KB")
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    whole = family("wan", folder).load_teacher().state_dict()
    single = family("wan", new(tmp_path / "single", "wan")).load_teacher().state_dict()
    assert all(torch.equal(whole[name], single[name]) for name in single)
    shards[1].unlink()
    refused(rf"lacks 1 of its {len(shards)} shards, e.g. {shards[1].name}", "wan", folder)
    (folder / "transformer" / f"{NAME}.index.json").unlink()
    refused("has shards, but not .*index.json", "wan", folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_are_asked_for_by_name(tmp_path: Path, sharded: bool) -> None:
    more = {"max_shard_size": "20KB"} if sharded else {}
    folder = new(tmp_path / "teacher", "wan", variant="fp16", **more)
    refused("teacher.options.variant: .*of a variant only; set it to fp16", "wan", folder)
    refused("teacher.options.variant: .*no variant 'pf16'; did you mean 'fp16'", "wan", folder, variant="pf16")
    made = family("wan", folder, variant="fp16")
    loaded = made.load_teacher().state_dict()
    assert all(value.device.type == "cpu" for value in loaded.values())
    assert any(".fp16" in name for name in made.teacher_files())
    refused("has no variant 'fp16'; leave it out", "wan", new(tmp_path / "plain", "wan"), variant="fp16")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = new(tmp_path / "teacher", "wan", safe_serialization=False)
    refused("has its weights in diffusion_pytorch_model.bin; .* is needed", "wan", folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen_image", "QwenImageEditPipeline"), ("qwen_image", "QwenImageEditPlusPipeline"),
        ("qwen_image", "QwenImageLayeredPipeline"), ("qwen_image", "QwenImageControlNetPipeline"),
        ("qwen_image", "QwenImageInpaintPipeline"), ("wan", "WanImageToVideoPipeline"), ("wan", "WanVACEPipeline"),
        ("wan", "WanVideoToVideoPipeline"), ("wan", None),
    ],
)  # fmt: skip
def test_other_pipelines_are_refused_by_name(copies, name: str, kind: str | None) -> None:
    folder = copies(name)
    edit(folder / "model_index.json", _class_name=kind)
    refused(rf"is of a {kind}; family '{name}' takes a {PIPELINES[name]}", name, folder)
    family(name, folder / "transformer").load_teacher()  # of the transformer alone nothing else can be told


def test_of_two_transformers_one_can_be_chosen(tmp_path: Path) -> None:
    """Wan 2.2: the second one is used below boundary_ratio; without it only one of them alone is taken."""
    high, low = (diffusers.WanTransformer3DModel(**CONFIGS["wan"]) for _ in range(2))
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    folder = tmp_path / "a14b"
    diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=high, transformer_2=low,
        boundary_ratio=0.875,
    ).save_pretrained(folder)  # fmt: skip
    assert family("wan", folder).load_teacher().boundary == 0.875
    for subfolder, network in (("transformer", high), ("transformer_2", low)):
        found = family("wan", folder, subfolder=subfolder).load_teacher().state_dict()
        assert torch.equal(found["transformer.proj_out.weight"], network.state_dict()["proj_out.weight"])
    (folder / "model_index.json").unlink()
    refused("two transformers", "wan", folder)


def test_a_pipeline_that_has_one_of_two_is_taken(copies) -> None:
    """TI2V-5B: its model_index.json names a second one, which it has not."""
    folder = copies("wan")
    edit(folder / "model_index.json", transformer_2=[None, None], boundary_ratio=None, expand_timesteps=True)
    family("wan", folder).load_teacher()


@pytest.mark.parametrize(
    ("name", "config", "options", "words"),
    [
        ("wan", {"image_dim": 24}, {}, "attends to an image's embeddings .image_dim 24"),
        ("wan", {"added_kv_proj_dim": 24}, {}, "attends to an image's embeddings"),
        ("wan", {"in_channels": 9}, {}, "takes 9 channels and gives 4; an image's go with .*image_channels: 5, not 0"),
        ("wan", {"rope_max_seq_len": 2}, {}, r"makes \[3, 4, 3\] patches along the axes, but .* 2 positions"),
        ("wan", {"in_channels": 6, "out_channels": 6}, {}, "the teacher takes 6 channels, not 4"),
        ("qwen_image", {"use_layer3d_rope": True}, {}, "has use_layer3d_rope"),
        ("qwen_image", {"zero_cond_t": True}, {}, "has zero_cond_t"),
        ("qwen_image", {"use_additional_t_cond": True}, {}, "has use_additional_t_cond"),
        ("qwen_image", {"in_channels": 32, "out_channels": 4}, {}, "takes 32 channels and gives 4"),
        ("qwen_image", {}, {"latent_shape": [4, 1, 16388, 6]}, r"\[8194, 3\] patches.* 8192 positions"),
    ],
)
def test_configs_that_the_family_would_run_otherwise(tmp_path, name, config, options, words) -> None:
    refused(words, name, new(tmp_path / "teacher", name, config), **options)


def test_image_to_video_with_channels_alone_is_taken(tmp_path: Path) -> None:
    folder = new(tmp_path / "teacher", "wan", {"in_channels": 9})
    edit(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    family("wan", folder, image_channels=5).load_teacher()


def recipe_of(name: str, folder: Path, columns, where: Path):
    options = json.dumps({"latent_shape": SHAPES[name]})
    prompts = write_prompts(where / "prompts.parquet", columns)
    return load_recipe("ring", [f"teacher.family={name}", f"teacher.path={folder}", f"teacher.options={options}",
                                f"prompts.path={prompts}"])  # fmt: skip


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_prompts_are_held_against_the_teacher_on_the_driver(name: str, plain, tmp_path: Path) -> None:
    columns = rows()
    check(recipe_of(name, plain[name], columns, tmp_path))
    wide = np.zeros((3, 7, WIDTH + 1), dtype=np.float32)
    with pytest.raises(UserError, match="'prompt_embeds' is of width 17, but the teacher takes 16"):
        both = {**columns, "prompt_embeds": wide, "negative_prompt_embeds": wide}
        check(recipe_of(name, plain[name], both, tmp_path))
    with pytest.raises(UserError, match="'negative_prompt_embeds' is"):
        check(recipe_of(name, plain[name], {**columns, "negative_prompt_embeds": wide}, tmp_path))


def test_texts_beyond_the_rotary_embedding_are_refused(plain, tmp_path: Path) -> None:
    long = rows(count=1, length=4096, null_length=4096)
    with pytest.raises(UserError, match="4096 tokens do not go with latent_shape .* begin at 2"):
        check(recipe_of("qwen_image", plain["qwen_image"], {k: v[:1] for k, v in long.items()}, tmp_path))


def test_the_check_reads_headers_and_never_the_weights(tmp_path: Path, monkeypatch) -> None:
    """A 20 B model is not loaded on the driver: of files that are all holes, nothing is missed."""
    folder = tmp_path / "teacher"
    (folder / "transformer").mkdir(parents=True)
    config = {"_class_name": "QwenImageTransformer2DModel"}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = diffusers.QwenImageTransformer2DModel()
    entries, at = {}, 0
    for name, tensor in network.state_dict().items():
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    header = json.dumps(entries).encode()
    with (folder / "transformer" / NAME).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    assert at > 40e9
    before = read_bytes()
    build_family("qwen_image", str(folder)).check_teacher()
    assert read_bytes() - before < 10 * 2**20


def read_bytes() -> int:
    """Return how many bytes this process has read so far, from disk or cache."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
