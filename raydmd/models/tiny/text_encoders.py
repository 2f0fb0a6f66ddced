"""Writes the text encoders and tokenizers of some families: their own classes, tiny, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def qwen_image(width: int) -> Any:
    """Return a pipeline with nothing in it but Qwen's text model; its tokens are bytes."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": words[-3:]})
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, rope_parameters=rope, max_position_embeddings=2048,
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=width),
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    return QwenImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None)


def wan(width: int) -> Any:
    """Return a pipeline with nothing in it but Wan's text model; its tokens are small letters."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    config = UMT5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return WanPipeline(tokenizer=tokenizer, text_encoder=UMT5EncoderModel(config).eval(), vae=None, scheduler=None)


def clip_tokenizer() -> Any:
    """Return CLIP's tokenizer; its tokens are small letters, inside a word and at its end."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_config(width: int, projected: int) -> Any:
    """Return the config of a CLIP's text model."""
    last = 2 * len(LETTERS) + 1
    return CLIPTextConfig(
        vocab_size=last + 1, hidden_size=width, intermediate_size=16, projection_dim=projected, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last,
    )  # fmt: skip


def t5(width: int) -> tuple[Any, Any]:
    """Return a T5's tokenizer, whose tokens are small letters, and its encoder."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5Tokenizer(vocab=words, extra_ids=0), T5EncoderModel(config).eval()


def sd3(width: int) -> Any:
    """Return a pipeline with nothing in it but its three text models; the CLIPs together are narrower than T5."""
    clips = [CLIPTextModelWithProjection(clip_config(width // 2 - 2, 6)).eval() for _ in range(2)]
    tokenizer, encoder = t5(width)
    return StableDiffusion3Pipeline(
        transformer=None, scheduler=None, vae=None, text_encoder=clips[0], tokenizer=clip_tokenizer(),
        text_encoder_2=clips[1], tokenizer_2=clip_tokenizer(), text_encoder_3=encoder, tokenizer_3=tokenizer,
    )  # fmt: skip


def cogvideox(width: int) -> Any:
    """Return a pipeline with nothing in it but T5."""
    tokenizer, encoder = t5(width)
    return CogVideoXPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, transformer=None, scheduler=None)


def flux(width: int) -> Any:
    """Return a pipeline with nothing in it but CLIP's text model, 12 wide, and T5."""
    tokenizer, encoder = t5(width)
    return FluxPipeline(
        scheduler=None, vae=None, text_encoder=CLIPTextModel(clip_config(12, 12)).eval(), tokenizer=clip_tokenizer(),
        text_encoder_2=encoder, tokenizer_2=tokenizer, transformer=None,
    )  # fmt: skip


def qwen3(width: int, layers: int) -> tuple[Any, Any]:
    """Return Qwen3's tokenizer, whose tokens are bytes, and the config of its text model."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": words[-3:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}"
    )
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    return tokenizer, config


def z_image(width: int) -> Any:
    """Return a pipeline with nothing in it but Qwen3's text model."""
    tokenizer, config = qwen3(width, 2)
    model = Qwen3Model(config).eval()
    return ZImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None)


def flux2_klein(width: int) -> Any:
    """Return a pipeline with nothing in it but Qwen3's, three of whose 27 layers side by side are of the width."""
    tokenizer, config = qwen3(width // 3, 27)
    model = Qwen3ForCausalLM(config).eval()
    return Flux2KleinPipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None)


PIPELINES = {
    "qwen_image": qwen_image, "wan": wan, "sd3": sd3, "flux": flux, "z_image": z_image, "flux2_klein": flux2_klein,
}  # fmt: skip


def put_text_encoder(name: str, width: int, folder: Path) -> None:
    """Put a family's text encoder and tokenizer into a teacher's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        PIPELINES[name](width).save_pretrained(folder)
