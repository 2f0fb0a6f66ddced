"""A small diffusion transformer on 8x8 digits (DiT, Peebles & Xie 2023), and its family."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydmd.data.digits import CLASSES, PIXEL_SCALE, SIZE
from raydmd.diffusion.schedule import RectifiedFlow
from raydmd.errors import UserError
from raydmd.models.base import Conditions, Denoiser, EmbeddedFamily, require_column
from raydmd.models.embedded.ring import geometric, time_features

NULL_LABEL = CLASSES


class Block(nn.Module):
    """A transformer block with adaLN-zero: shift, scale and gate of both branches come from the conditioning."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return tokens like ``x`` [B, N, width], given the activated conditioning ``c`` [B, 1, width]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        batch, tokens, width = x.shape
        h = torch.addcmul(shift_a, F.layer_norm(x, (width,), eps=1e-6), 1 + scale_a)
        q, k, v = self.qkv(h).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = torch.addcmul(x, gate_a, self.proj(h))
        h = torch.addcmul(shift_m, F.layer_norm(x, (width,), eps=1e-6), 1 + scale_m)
        return torch.addcmul(x, gate_m, self.fc2(F.gelu(self.fc1(h), approximate="tanh")))


class DigitsDiT(Denoiser):
    """DiT on [B, 1, 8, 8]: 4 tokens of 4x4 pixels and 243,792 parameters at the default, adaLN-zero.

    The condition is ``label``, int64 [B]: 0..9, or 10 for none. The time is in [0, 1].

    Args:
        width: of a token.
        depth: number of blocks.
        heads: of the attention.
        patch: pixels along a token's side.
        ratio: the MLP's width over the token's.
        seed: of the initial weights; the global random state is left alone.
    """

    frequencies: Tensor

    def __init__(
        self, width: int = 64, depth: int = 3, heads: int = 4, patch: int = 4, ratio: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        if min(width, depth, heads, patch, ratio) < 1 or SIZE % patch or width % heads or width % 2:
            raise UserError(
                f"teacher.options: all are above 0, patch ({patch}) divides {SIZE}, width ({width}) is even and a "
                f"multiple of heads ({heads})"
            )
        self.patch, self.grid = patch, SIZE // patch
        # Not DiT's 1000 at the top: t is continuous, and a network that is smoother in t learns it as well.
        self.register_buffer("frequencies", geometric(0.1, 100.0, width // 2), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.patch_in = nn.Linear(patch * patch, width)
            self.position = nn.Parameter(0.02 * torch.randn(self.grid**2, width))
            self.time_in = nn.Linear(width, width)
            self.time_out = nn.Linear(width, width)
            self.label = nn.Embedding(CLASSES + 1, width)
            self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
            self.final_modulation = nn.Linear(width, 2 * width)
            self.patch_out = nn.Linear(width, patch * patch)
            self._initialise()

    def _initialise(self) -> None:
        """Xavier for linear layers, small embeddings, and zero where adaLN-zero wants the identity at the start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for small in (self.time_in, self.time_out, self.label):
            nn.init.normal_(small.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.patch_out.weight)

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict the flow from ``latents`` [B, 1, 8, 8] at ``t`` [B], given ``conditions["label"]`` [B]."""
        batch, g, p = latents.shape[0], self.grid, self.patch
        x = latents.reshape(batch, g, p, g, p).permute(0, 1, 3, 2, 4).reshape(batch, g * g, p * p)
        x = self.patch_in(x) + self.position
        features = time_features(t, self.frequencies).to(latents.dtype)
        c = self.time_out(F.silu(self.time_in(features))) + self.label(conditions["label"])
        c = F.silu(c)[:, None]
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        x = self.patch_out(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))
        return x.view(batch, g, g, p, p).permute(0, 1, 3, 2, 4).reshape(latents.shape)

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the transformer's blocks."""
        return {f"blocks.{number}": block for number, block in enumerate(self.blocks)}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return width, grid, grid."""
        return self.patch_in.out_features, self.grid, self.grid


class DigitsFamily(EmbeddedFamily):
    """scikit-learn's 8x8 digits, conditioned on the class (column ``label``), rectified flow."""

    name: ClassVar[str] = "digits"
    defaults: ClassVar[Mapping[str, Any]] = {"width": 64, "depth": 3, "heads": 4, "patch": 4, "ratio": 4}
    meanings: ClassVar[Mapping[str, str]] = {
        "width": "of a token", "depth": "number of blocks", "heads": "of the attention",
        "patch": "pixels along a token's side", "ratio": "the MLP's width over the token's",
    }  # fmt: skip

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        self.latent_shape = (1, SIZE, SIZE)
        self.schedule = RectifiedFlow()
        self.lora_targets = ["qkv", "proj", "fc1", "fc2", "modulation", "final_modulation", "patch_in", "patch_out"]
        self.condition_columns = ["label"]

    def new_network(self, seed: int = 0) -> DigitsDiT:
        """Build the untrained transformer of ``options``."""
        return DigitsDiT(**self.options, seed=seed)

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return ``label`` [B] int64 of the column of that name, 0..9, or 10 for none."""
        labels = np.asarray(require_column(rows, "label"))
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UserError(f"prompts: column 'label' holds whole numbers 0..{NULL_LABEL - 1}, not {labels.dtype}")
        if labels.size and not 0 <= labels.min() <= labels.max() <= NULL_LABEL:
            raise UserError(f"prompts: column 'label' has values outside 0..{NULL_LABEL - 1}, e.g. {labels.max()}")
        return {"label": torch.from_numpy(labels.astype(np.int64))}

    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return the null label for the same batch."""
        return {"label": torch.full_like(conditions["label"], NULL_LABEL)}

    @property
    def patches(self) -> tuple[int, int, int]:
        """Squares of the option ``patch``."""
        return 1, self.options["patch"], self.options["patch"]

    def check_pixels(self, key: str) -> None:
        """Allow them."""

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 1, 1, 8, 8], ink at 1."""
        return (latents / PIXEL_SCALE)[:, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures [B, 1, 8, 8] in [0, 1], ink at 1."""
        return (self.to_pixels(latents)[:, 0] + 1).div(2).clamp(0, 1)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Grey, 8 x 8."""
        return 1, SIZE, SIZE

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return latents [B, 1, 8, 8] of grey pictures in [-1, 1], ink at 1."""
        return PIXEL_SCALE * pixels
