"""What a forward pass of a frozen teacher takes in its own dtype and in 8 bits: seconds, bytes of weights, and how far
its prediction moves. A Qwen-Image of random weights, by default of a size for a CPU.

    python benchmarks/teacher_quantization.py --json teacher_quantization.json
    python benchmarks/teacher_quantization.py --device cuda --kinds int8 fp8 --width 3072 --layers 12 --side 64
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from raydmd.models.diffusers.quantization import diffusers_networks, quantized_copy, weight_bytes
from raydmd.models.diffusers.qwen_image import QwenImageDenoiser

CHANNELS, TEXT, TOKENS, HEAD = 16, 256, 64, 64


def seconds(denoiser: Any, inputs: tuple[Any, ...], device: torch.device, rounds: int) -> tuple[float, torch.Tensor]:
    """Return the median seconds of a forward pass, and its prediction."""
    taken = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        with torch.no_grad():
            made = denoiser(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return median(taken[1:]), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", default=["int8"], choices=["int8", "fp8"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.manual_seed(0)
    network: Any = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=given.layers, attention_head_dim=HEAD,
        num_attention_heads=given.width // HEAD, joint_attention_dim=TEXT, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = QwenImageDenoiser(network.to(dtype)).requires_grad_(False).eval()
    conditions = {
        "prompt_embeds": torch.randn(2, TOKENS, TEXT, device=device),
        "prompt_embeds_mask": torch.ones(2, TOKENS, dtype=torch.bool, device=device),
    }
    x = torch.randn(2, CHANNELS, 1, given.side, given.side, device=device)
    inputs = (x, torch.tensor([0.3, 0.8], dtype=torch.float64, device=device), conditions)
    result: dict[str, dict[str, float]] = {}
    exact = None
    for kind in ("none", *given.kinds):
        copied = copy.deepcopy(teacher) if kind == "none" else quantized_copy(teacher, kind, device)
        denoiser = copied.to(device)
        taken, made = seconds(denoiser, inputs, device, given.rounds)
        exact = made if exact is None else exact
        result[kind] = {
            "seconds": round(taken, 4),
            "weights_mb": round(weight_bytes(diffusers_networks(denoiser)) / 1e6, 1),
            "moved": float((made - exact).norm() / exact.norm()),
        }
        print(f"{kind} ({dtype}): {result[kind]}".replace("torch.", ""))
        del denoiser, copied
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
