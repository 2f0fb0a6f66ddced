"""Writes the text encoders and tokenizers of Qwen-Image and Wan: their own classes, tiny, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline, WanPipeline
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
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


PIPELINES = {"qwen_image": qwen_image, "wan": wan}


def put_text_encoder(name: str, width: int, folder: Path) -> None:
    """Put a family's text encoder and tokenizer into a teacher's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        PIPELINES[name](width).save_pretrained(folder)
