"""Write a Qwen-Image with 200 thousand random weights: real classes and files, so that every command can be tried.

python examples/tiny_qwen_image.py tiny-qwen-image
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH = 16  # of the text encoder
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def text_parts() -> dict[str, Any]:
    """Return the text encoder, and a tokenizer whose tokens are bytes."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + MARKS
    tokenizer: Any = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = dict(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters=rope, max_position_embeddings=2048,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return {"tokenizer": tokenizer, "text_encoder": encoder.eval()}


def tiny_qwen_image() -> Any:
    """Return the pipeline; its latents of 4 channels are an eighth of the picture's sides."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0, 0.0, 0.0, 0.0], latents_std=[1.0, 1.0, 1.0, 1.0],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    pipeline: Any = QwenImagePipeline
    return pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **text_parts())


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny-qwen-image")
    tiny_qwen_image().save_pretrained(folder)
    print(f"a random Qwen-Image: {folder}")
