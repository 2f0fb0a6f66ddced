"""EDM's networks of pixels (Karras et al. 2022), DMD's teachers on CIFAR-10 and ImageNet: a UNet2DModel as their F."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raydmd.diffusion.schedule import EDM, at_least_float32, broadcast
from raydmd.errors import UserError
from raydmd.models.base import Conditions, Family, require_column
from raydmd.models.diffusers.autoencoder import ImageAutoencoder
from raydmd.models.diffusers.denoiser import PretrainedDenoiser
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.teacher_folder import TeacherFolder
from raydmd.models.diffusers.unet import UNetBlocks, check_latent_sides

RHO = 7.0
"""Of the sampler's noise levels (Karras et al. Table 1)."""
PICKLES = (".pkl", ".pickle")


class EDMDenoiser(UNetBlocks):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. Eq. 7, Table 1), the prediction of x_0.

    Args:
        network: F, which takes c_noise as its timestep.
        sigma_data: the data's deviation.
        sigma_min: the least noise level that F is asked for.
    """

    def __init__(self, network: nn.Module, sigma_data: float, sigma_min: float) -> None:
        super().__init__(network)
        self.sigma_data, self.sigma_min = sigma_data, sigma_min

    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict x_0 from ``latents`` at noise levels ``t`` [B], given perhaps ``label`` [B]."""
        x, sigma = at_least_float32(latents), t.to(latents.device, torch.float64)
        total = sigma.square() + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt()
        c_noise = sigma.clamp(min=self.sigma_min).log() / 4.0
        made = self.network(
            (broadcast(c_in, x) * x).to(self.dtype), c_noise.float(), conditions.get("label"), return_dict=False
        )[0]
        return (broadcast(c_skip, x) * x + broadcast(c_out, x) * made.to(x)).to(latents.dtype)


class EDMFamily(PretrainedFamily):
    """A class-conditional or unconditional EDM network; its latents are pixels in [-1, 1].

    The teacher's folder is that of a diffusers UNet2DModel, whose forward pass is F. Options besides those of
    pretrained families:

    - ``latent_shape``: channels, height and width of a picture; the default is CIFAR-10's;
    - ``classes``: how many there are; 0: the network is unconditional. Where it has one class more, the last is the
      label of none, for guidance;
    - ``sigma_data``, ``sigma_min``, ``sigma_max``: Karras et al.'s.

    Column: ``label``, 0 to ``classes`` - 1, where there are classes.
    """

    name: ClassVar[str] = "edm"
    network_class: ClassVar[str] = "UNet2DModel"
    denoiser = EDMDenoiser
    autoencoder = ImageAutoencoder
    widths: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {
        **{key: PretrainedFamily.defaults[key] for key in ("dtype", "gradient_checkpointing", "variant")},
        "latent_shape": [3, 32, 32], "subfolder": "unet", "classes": 0, "sigma_data": 0.5, "sigma_min": 0.002,
        "sigma_max": 80.0,
    }  # fmt: skip
    meanings: ClassVar[Mapping[str, str]] = {
        "classes": "of the data; 0: unconditional",
        "sigma_data": "the data's standard deviation in the preconditioning",
        "sigma_min": "lowest noise level",
        "sigma_max": "highest noise level, at which sampling begins",
    }
    prediction = "x0"
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"]

    use_quantization = Family.use_quantization  # its network is of convolutions

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        for key in ("sigma_data", "sigma_min", "sigma_max"):
            value = self.options[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
                raise UserError(f"teacher.options.{key}: a number above 0 is needed, not {value!r}")
        if self.options["sigma_min"] >= self.options["sigma_max"]:
            raise UserError(f"teacher.options.sigma_min: {self.options['sigma_min']:g} is not below sigma_max "
                            f"{self.options['sigma_max']:g}")  # fmt: skip
        self.condition_columns = ["label"] if self.options["classes"] else []

    @cached_property
    def schedule(self) -> EDM:  # type: ignore[override]
        """The variance-exploding process up to ``sigma_max``; a time is a noise level."""
        return EDM(self.options["sigma_max"])

    # The network.

    @property
    def pipelines(self) -> tuple[str, ...]:
        """None: diffusers has no pipeline of EDM's networks."""
        return ()

    def teacher_folder(self) -> TeacherFolder:
        """Return where the UNet lies.

        Raises:
            UserError: nothing there, or a pickle or a pipeline is.
        """
        path = Path(self.path or "")
        found = [path] if path.is_file() else sorted(path.iterdir()) if self.path and path.is_dir() else []
        pickle = next((file.name for file in found if file.suffix in PICKLES), None)
        if pickle is not None and not (path / "config.json").is_file():
            raise UserError(f"teacher.path: {pickle} is a pickle, which can run anything and is not read; load it "
                            f"where you trust it, put its weights into a diffusers UNet2DModel, and save that with "
                            f"save_pretrained")  # fmt: skip
        folder = super().teacher_folder()
        if folder.subfolder is not None and (folder.root / "model_index.json").is_file():
            raise UserError(f"teacher.path: {folder.root} is a pipeline's, which runs its UNet without EDM's "
                            f"preconditioning; family 'edm' takes the folder of a UNet2DModel alone")  # fmt: skip
        return folder

    def _wrap(self, network: Any) -> PretrainedDenoiser:
        return EDMDenoiser(network, float(self.options["sigma_data"]), float(self.options["sigma_min"]))

    def _check_latent_shape(self) -> None:
        if len(self.latent_shape) != 3 or self.latent_shape[0] not in (1, 3):
            raise UserError(f"teacher.options.latent_shape: [1 or 3, H, W], not {list(self.latent_shape)}")

    def _check_config(self, config: Any) -> None:
        where, classes = f"teacher.path: the UNet in '{self.path}'", self.options["classes"]
        if config.in_channels != self.latent_shape[0] or config.out_channels != config.in_channels:
            raise UserError(f"teacher.options.latent_shape: the teacher takes {config.in_channels} channels and gives "
                            f"{config.out_channels}, not {self.latent_shape[0]}")  # fmt: skip
        if config.time_embedding_type != "positional":
            raise UserError(f"{where} has time_embedding_type {config.time_embedding_type}, which cannot take c_noise, "
                            f"a quarter of the logarithm of sigma; positional can")  # fmt: skip
        if config.class_embed_type is not None or config.center_input_sample:
            raise UserError(f"{where} has class_embed_type or center_input_sample, which family 'edm' does not know")
        if config.mid_block_type is None:
            raise UserError(f"{where} has no middle block, which family 'edm' does not know")
        if (config.num_class_embeds or 0) not in ((classes, classes + 1) if classes else (0,)):
            there = config.num_class_embeds or 0
            hint = f"{there}, or {there - 1} where the last is the label of none" if there else "0"
            raise UserError(
                f"teacher.options.classes: the teacher has {there} classes, not {classes}; set it to {hint}"
            )
        check_latent_sides(self.latent_shape, len(config.block_out_channels))

    # Conditions.

    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Return ``label`` [B] int64 of the column of that name; nothing where there are no classes.

        Raises:
            UserError: the column is missing, or holds another thing than classes.
        """
        if not (classes := self.options["classes"]):
            return {}
        labels = np.asarray(require_column(rows, "label"))
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UserError(f"prompts: column 'label' holds whole numbers 0..{classes - 1}, not {labels.dtype}")
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(f"prompts: column 'label' has values outside 0..{classes - 1}, e.g. {wrong}")
        return {"label": torch.from_numpy(labels.astype(np.int64))}

    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return the label of none for the same batch.

        Raises:
            UserError: the network has none.
        """
        classes = self.options["classes"]
        if self.network_config.get("num_class_embeds") != classes + 1:
            raise UserError(f"teacher.guidance_scale: the teacher in '{self.path}' has no label of none, without which "
                            f"there is no guidance; use 1")  # fmt: skip
        return {"label": torch.full_like(conditions["label"], classes)}

    def check_conditions(self, conditions: Conditions) -> None:
        """Allow them: `conditions` has looked at the labels."""

    @property
    def reads_text(self) -> bool:
        """False: there is no text."""
        return False

    # Pictures, which the latents are.

    def check_pixels(self, key: str) -> None:
        """Allow them."""

    @property
    def frames(self) -> int:
        """One, of a picture."""
        return 1

    @property
    def patches(self) -> None:  # type: ignore[override]
        """None: a UNet has no tokens."""
        return None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of ``latent_shape``."""
        return self.latent_shape[-1], self.latent_shape[-2]

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """That of the latents."""
        channels, height, width = self.latent_shape
        return channels, height, width

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return ``latent_shape``: the network was trained on pictures of one size.

        Raises:
            UserError: another size.
        """
        if (width, height) != self.picture_size:
            own = "x".join(str(side) for side in self.picture_size)
            raise UserError(f"sizes: family 'edm' makes pictures of {own} pixels, not {width}x{height}")
        return self.latent_shape

    def sample_shape(self, frames: int | None, height: int, width: int) -> tuple[int, ...]:
        """Refuse any: the network was trained on pictures of one size."""
        return Family.sample_shape(self, frames, height, width)

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Return the latents as one frame [B, 1, 1 or 3, H, W]."""
        return latents[:, None]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return pictures [B, C, H, W] in [-1, 1] as they are."""
        return pixels

    def decode_video(self, latents: Tensor) -> Tensor:
        """Return the latents as one frame [B, 1, 1 or 3, H, W] in [0, 1]."""
        return (self.to_pixels(latents).clamp(-1, 1) + 1) / 2

    # Its sampler.

    def teacher_times(
        self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None
    ) -> list[float]:
        """Return EDM's noise levels (Karras et al. Eq. 5), the last 0: without ``shift``, evenly in sigma^(1/7)."""
        if shift is not None or steps < 1:
            return super().teacher_times(steps, shift, shape)
        high, low = (float(self.options[key]) ** (1.0 / RHO) for key in ("sigma_max", "sigma_min"))
        inner = [(high + i / (steps - 1) * (low - high)) ** RHO for i in range(1, steps)]
        return [self.schedule.t_max, *inner, 0.0]
