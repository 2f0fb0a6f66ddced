"""A tiny EDM."""

from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from raydmd.models.tiny.base import Rows, TinyModel

CLASSES = 5


class TinyEDM(TinyModel):
    """A class-conditional EDM network with a label of none, whose weights make its output depend on its input."""

    family = "edm"
    options = {"latent_shape": [3, 8, 12], "classes": CLASSES}

    def parts(self) -> dict[str, Any]:
        """Make the network."""
        network: Any = UNet2DModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            resnet_time_scale_shift="scale_shift", num_class_embeds=CLASSES + 1,
        )  # fmt: skip
        with torch.no_grad():
            network.conv_in.weight.mul_(4.0)
        return {"unet": network}

    def columns(self, count: int, draw: np.random.Generator) -> Rows:
        """Draw classes."""
        return {"label": draw.integers(0, CLASSES, count)}
