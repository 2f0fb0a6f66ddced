"""Qwen-Image and Wan: diffusers' own classes with tiny random weights, saved and loaded as real ones are."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)

from raydmd.errors import UserError
from raydmd.models.diffusers.denoiser import checkpoint
from raydmd.models.diffusers.packing import pack, unpack
from raydmd.models.experts import Experts
from raydmd.models.registry import build_family

torch.set_num_threads(1)

WIDTH, LENGTH = 16, 7
SHAPES = {"qwen_image": [4, 1, 8, 6], "wan": [4, 3, 8, 6]}
CONFIGS = {
    "qwen_image": dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    ),
    "wan": dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ),
}  # fmt: skip
CLASSES = {"qwen_image": QwenImageTransformer2DModel, "wan": WanTransformer3DModel}
VAES = {
    "qwen_image": lambda **extra: AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **extra
    ),
    "wan": lambda **extra: AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **extra),
}
STATISTICS = dict(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1])
NAMES = sorted(SHAPES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline's folder of each: transformer/ and vae/."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            CLASSES[name](**CONFIGS[name]).save_pretrained(folder / "transformer")
            VAES[name](**STATISTICS).save_pretrained(folder / "vae")
        made[name] = str(folder)
    return made


def family_of(name, folder, **options):
    return build_family(name, folder, {"latent_shape": SHAPES[name], **options})


def rows(count=3, length=LENGTH, null_length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    columns = {
        "prompt_embeds": rng.standard_normal((count, length, WIDTH)).astype(np.float32),
        "prompt_embeds_mask": np.ones((count, length), dtype=np.int64),
        "negative_prompt_embeds": rng.standard_normal((count, null_length, WIDTH)).astype(np.float32),
        "negative_prompt_embeds_mask": np.ones((count, null_length), dtype=np.int64),
    }
    columns["prompt_embeds_mask"][0, -2:] = 0
    return columns


def inputs(family, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *family.latent_shape, generator=generator)
    t = torch.tensor([0.2, 0.55, 0.9], dtype=torch.float64)[:count]
    return x, t, family.conditions({k: v for k, v in rows(count).items() if k in family.condition_columns})


def moved(a, b, least=1e-4):
    return bool(((a - b).flatten(1).abs().amax(1) > least).all())


def test_qwen_is_given_what_the_pipeline_gives_it(folders):
    """The pipeline's own packing and its timestep / 1000, against the adapter; other scales and packings differ."""
    family = family_of("qwen_image", folders["qwen_image"])
    teacher = family.load_teacher()
    x, t, conditions = inputs(family)
    height, width = x.shape[-2:]
    timestep = 1000 * t.float()

    def by_hand(packed, timestep):
        out = teacher.transformer(
            hidden_states=packed,
            timestep=timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
        ).sample
        return QwenImagePipeline._unpack_latents(out, 8 * height, 8 * width, 8)

    packed = QwenImagePipeline._pack_latents(x, len(x), x.shape[1], height, width)
    y = teacher(x, t, conditions)
    assert torch.allclose(y, by_hand(packed, timestep / 1000), atol=1e-6)
    assert moved(y, by_hand(packed, timestep))
    assert moved(y, by_hand(packed.flip(1), timestep / 1000))
    flat = teacher(x[:, :, 0], t, conditions)  # without the frame's axis
    assert torch.equal(flat, y[:, :, 0])


def test_packing_goes_there_and_back():
    x = torch.arange(2 * 4 * 8 * 6.0).reshape(2, 4, 1, 8, 6)
    packed = pack(x)
    assert torch.equal(packed, QwenImagePipeline._pack_latents(x, 2, 4, 8, 6))
    assert torch.equal(unpack(packed, x.shape), x)
    assert torch.equal(unpack(pack(x[:, :, 0]), x[:, :, 0].shape), x[:, :, 0])
    assert not torch.equal(unpack(packed.flip(1), x.shape), x)


def test_wan_counts_time_to_a_thousand(folders):
    family = family_of("wan", folders["wan"])
    teacher = family.load_teacher()
    x, t, conditions = inputs(family)

    def by_hand(timestep):
        return teacher.transformer(
            hidden_states=x, timestep=timestep, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False
        )[0]

    y = teacher(x, t, conditions)
    assert torch.allclose(y, by_hand(1000 * t.float()), atol=1e-6)
    assert moved(y, by_hand(t.float()))


def test_qwen_padding_is_masked(folders):
    """A null prompt of another length: the shorter is padded; masked padding changes nothing, seen padding does."""
    family = family_of("qwen_image", folders["qwen_image"])
    teacher = family.load_teacher()
    x, t, conditions = inputs(family)
    longer = family.conditions(rows(null_length=LENGTH + 4))
    assert longer["prompt_embeds"].shape == longer["negative_prompt_embeds"].shape == (3, LENGTH + 4, WIDTH)
    assert longer["prompt_embeds_mask"].sum() == conditions["prompt_embeds_mask"].sum()
    y = teacher(x, t, conditions)
    assert torch.allclose(teacher(x, t, longer), y, atol=1e-5)
    seen = {**longer, "prompt_embeds_mask": torch.ones_like(longer["prompt_embeds_mask"])}
    assert moved(teacher(x, t, seen), y)
    shorter = family.conditions(rows(null_length=2))
    assert shorter["negative_prompt_embeds"].shape == (3, LENGTH, WIDTH)
    assert shorter["negative_prompt_embeds_mask"].sum(1).tolist() == [2, 2, 2]
    null = family.unconditional(shorter)  # the null prompt comes with its own mask, not the prompt's
    assert torch.equal(null["prompt_embeds_mask"], shorter["negative_prompt_embeds_mask"])
    mixed = {**null, "prompt_embeds_mask": shorter["prompt_embeds_mask"]}
    assert moved(teacher(x, t, null), teacher(x, t, mixed))


def test_wan_image_to_video(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        WanTransformer3DModel(**{**CONFIGS["wan"], "in_channels": 9}).save_pretrained(tmp_path)
    family = family_of("wan", str(tmp_path), image_channels=5)  # the transformer's own folder will do
    teacher = family.load_teacher()
    image = np.random.default_rng(2).standard_normal((3, 5, 3, 8, 6)).astype(np.float32)
    conditions = family.conditions({**rows(), "image_latents": image})
    x, t = torch.randn(3, 4, 3, 8, 6, generator=torch.Generator().manual_seed(0)), torch.rand(3, dtype=torch.float64)
    y = teacher(x, t, conditions)
    assert y.shape == x.shape
    assert moved(y, teacher(x, t, {**conditions, "image_latents": conditions["image_latents"] + 1}))
    assert torch.equal(family.unconditional(conditions)["image_latents"], conditions["image_latents"])
    with pytest.raises(UserError, match="no column 'image_latents'"):
        family.conditions(rows())
    with pytest.raises(UserError, match=r"'image_latents' is \[4, 3, 8, 6\] a row, not \[5, 3, 8, 6\]"):
        family.conditions({**rows(), "image_latents": image[:, :4]})


@pytest.mark.parametrize("name", NAMES)
def test_lora_experts(name, folders):
    family = family_of(name, folders[name])
    teacher = family.load_teacher()
    experts = Experts(teacher, 2, "lora", 4, 8.0, family.lora_targets, 0)
    x, t, conditions = inputs(family)
    experts.start(0)
    experts.start(1)
    names = list(experts.trainable_parameters())
    assert all(name.startswith("transformer.") for name in names)
    for target in family.lora_targets:
        assert any(f".{target}.lora_A.weight" in name for name in names), target
    expert = experts.expert(1)
    assert torch.equal(expert(x, t, conditions), teacher(x, t, conditions))
    expert(x, t, conditions).square().mean().backward()
    reached = {n for n, p in experts.trainable_parameters().items() if p.grad is not None and p.grad.abs().max() > 0}
    # lora_A's gradient is zero while lora_B is; the last Qwen block's text result is used by nothing
    expected = {n for n in names if "lora_B" in n}
    if name == "qwen_image":
        last = ("add_q_proj", "to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        expected -= {f"transformer.transformer_blocks.1.{p}{end}.lora_B.weight" for end in last for p in ("", "attn.")}
    assert reached == expected
    with torch.no_grad():
        for parameter in experts.trainable_parameters().values():
            parameter.add_(0.1)
    assert moved(expert(x, t, conditions), teacher(x, t, conditions))
    assert torch.equal(experts.expert(0)(x, t, conditions), teacher(x, t, conditions))


@pytest.mark.parametrize("name", NAMES)
def test_full_expert(name, folders):
    family = family_of(name, folders[name])
    teacher = family.load_teacher()
    experts = Experts(teacher, 2, "full")
    experts.start(0)
    x, t, conditions = inputs(family)
    y = experts.expert(0)(x, t, conditions)
    assert torch.equal(y, teacher(x, t, conditions))
    y.square().mean().backward()
    assert sum(p.grad is not None for p in experts.parameters()) > 20
    other = Experts(teacher, 2, "full")
    other.load_state(0, experts.state(0))
    assert torch.equal(other.expert(0)(x, t, conditions), y)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_use_the_adapter_of_the_forward_pass(name, folders):
    """With gradient checkpointing, another expert called before the backward pass must not leak into it."""
    plain = family_of(name, folders[name]).load_teacher()
    family = family_of(name, folders[name], gradient_checkpointing=True)
    recomputed = family.load_teacher()
    assert recomputed.checkpointing and not plain.checkpointing
    batch = inputs(family)

    def gradients(teacher, interrupt, restore=True):
        experts = Experts(teacher, 2, "lora", 4, 8.0, family.lora_targets, 0)
        for index in (0, 1):
            experts.start(index)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(index)
                for parameter in experts.trainable_parameters().values():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if not restore:
            experts.backbone.checkpoint_activations(checkpoint)
        loss = experts.expert(1)(*batch).square().sum()
        if interrupt:
            with torch.no_grad():
                experts.expert(0)(*batch)
        loss.backward()
        assert not interrupt or experts._switch.active == "expert_0"  # the backward pass puts it back
        grads = {n: p.grad for n, p in experts.trainable_parameters().items() if p.grad is not None}
        return torch.cat([grads[n].flatten() for n in sorted(grads)])

    wanted = gradients(plain, True)
    assert torch.allclose(gradients(recomputed, False), wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradients(recomputed, True), wanted, rtol=1e-4, atol=1e-5)
    try:  # without that care the gradient is wrong, or torch notices
        wrong = gradients(recomputed, True, restore=False)
    except (RuntimeError, torch.utils.checkpoint.CheckpointError):
        return
    assert wrong.shape != wanted.shape or not torch.allclose(wrong, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_decode_with_and_without_a_vae(name, folders, tmp_path):
    family = family_of(name, folders[name])
    x = 0.5 * inputs(family)[0]
    pictures = family.decode(x)
    assert pictures.shape == (3, 3, 64, 48) and 0 <= pictures.min() and pictures.max() <= 1
    if name == "qwen_image":
        assert torch.equal(family.decode(x[:, :, 0]), pictures)
    # against the VAE itself, with latents normalised as the pipelines do; without that it differs
    vae = type(VAES[name]()).from_pretrained(folders[name] + "/vae")
    mean, std = (torch.tensor(STATISTICS[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        frames, raw = (vae.decode(z).sample for z in (x * std + mean, x))
    middle = frames.shape[2] // 2
    assert torch.allclose(pictures, (frames[:, :, middle] / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert not torch.allclose(pictures, (raw[:, :, middle] / 2 + 0.5).clamp(0, 1), atol=1e-3)

    CLASSES[name](**CONFIGS[name]).save_pretrained(tmp_path)
    preview = family_of(name, str(tmp_path)).decode(x)
    assert preview.shape == (3, 3, 8, 6)
    assert preview.amin((1, 2, 3)).tolist() == [0] * 3 and preview.amax((1, 2, 3)).tolist() == [1] * 3


def test_what_is_wrong_with_the_path_is_said_in_a_line(folders, tmp_path):
    qwen = folders["qwen_image"]

    def refused(message, name, path, **options):
        with pytest.raises(UserError, match=message) as error:
            family_of(name, path, **options).load_teacher()
        assert "\n" not in str(error.value) and str(error.value).startswith("teacher.")

    refused("needs the teacher's folder", "wan", None)
    refused("no folder '.*missing'", "wan", str(tmp_path / "missing"))
    refused("is of a QwenImageTransformer2DModel; family 'wan' needs a WanTransformer3DModel", "wan", qwen)
    refused("neither transformer/config.json nor config.json", "wan", str(tmp_path))
    refused("takes 4 channels, not 2", "qwen_image", qwen, latent_shape=[2, 1, 8, 8])
    refused("takes 4 channels, not 4 and image_channels 3", "wan", folders["wan"], image_channels=3)
    refused(r"\[3, 7, 6\] is not divisible", "wan", folders["wan"], latent_shape=[4, 3, 7, 6])
    (tmp_path / "config.json").write_text("{")
    refused("not a diffusers model's config", "wan", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **CONFIGS["wan"]}))
    refused("has no weights", "wan", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen_image", {"prompt_embeds": None}, "no column 'prompt_embeds'"),
        ("qwen_image", {"prompt_embeds_mask": None}, "no column 'prompt_embeds_mask'"),
        ("qwen_image", {"prompt_embeds_mask": np.ones((3, 4))}, r"'prompt_embeds_mask' is \[3, 4\], but"),
        ("qwen_image", {"prompt_embeds": np.ones((3, 4))}, r"embeddings \[tokens, width\], not \[4\] float64"),
        ("wan", {"prompt_embeds": None}, "no column 'prompt_embeds'"),
        ("wan", {"negative_prompt_embeds": np.ones((3, 4, WIDTH))}, "pad both with zeros"),
    ],
)
def test_prompt_columns_that_do_not_fit(name, change, message):
    columns = {key: value for key, value in {**rows(), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        family_of(name, None).conditions(columns)
