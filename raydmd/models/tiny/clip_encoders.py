"""Writes the text encoders and tokenizers of Stable Diffusion: CLIP's own classes, tiny, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 9  # of a prompt, 77 of the real ones


def tokenizer() -> CLIPTokenizer:
    """Return one whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    made: Any = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)
    return made


def text_model(width: int, pooled: int | None = None) -> Any:
    """Return CLIP's text model of ``width``, with a projection to ``pooled`` where it is given."""
    count = len(tokenizer())
    config = CLIPTextConfig(
        vocab_size=count, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=TOKENS, projection_dim=pooled or width, bos_token_id=count - 2, eos_token_id=count - 1,
    )  # fmt: skip
    return (CLIPTextModel if pooled is None else CLIPTextModelWithProjection)(config).eval()


def clip_pipeline(width: int, second: tuple[int, int] | None = None, **settings: Any) -> Any:
    """Return Stable Diffusion's pipeline, or XL's, with nothing in it but text encoders and tokenizers.

    Args:
        width: of the first text encoder.
        second: widths of XL's second one and of its projection.
        settings: of the pipeline.
    """
    parts: dict[str, Any] = dict(vae=None, unet=None, scheduler=None, tokenizer=tokenizer())
    parts["text_encoder"] = text_model(width)
    if second is None:
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return StableDiffusionPipeline(**parts, **settings)
    parts |= dict(text_encoder_2=text_model(*second), tokenizer_2=tokenizer())
    return StableDiffusionXLPipeline(**parts, **settings)


def put_clip(folder: Path, width: int, second: tuple[int, int] | None = None, **settings: Any) -> None:
    """Put the text encoders of `clip_pipeline` into a teacher's folder, and the pipeline's index."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip_pipeline(width, second, **settings).save_pretrained(folder)
