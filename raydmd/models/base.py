"""What the engine knows of a network (`Denoiser`) and of a kind of network (`Family`); teachers on disk."""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from raydmd.atomic import replacing, write_text
from raydmd.config.recipe import Quantization
from raydmd.data.conditions import Conditions as Conditions
from raydmd.diffusion.schedule import Prediction, Schedule
from raydmd.diffusion.times import step_grid
from raydmd.errors import UserError, nearest
from raydmd.objectives.guidance import GuidanceRescale

KINDS = {int: "a whole number", str: "text", bool: "true or false"}
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
QUANTIZATION_KEY = "teacher.quantization"
IMAGE_COLUMN = "image_latents"  # the condition that a picture makes, of families from image to video


def bucket_column(size: Sequence[int]) -> str:
    """Return the column of a picture's condition at the size of a bucket, [frames,] height and width in pixels."""
    return f"{IMAGE_COLUMN}_{'x'.join(map(str, size))}"


class Denoiser(nn.Module, ABC):
    """A network that predicts flow, noise or data from noisy latents, in its schedule's own time."""

    @abstractmethod
    def forward(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Predict from ``latents`` [B, *latent_shape] at times ``t`` [B]; the result is of their shape and dtype."""

    @property
    def parts(self) -> "Sequence[Denoiser]":
        """The networks that it is made of, each a denoiser by itself; most are one."""
        return [self]

    def part_of(self, t: Tensor) -> Tensor | None:
        """Return which of `parts` scores each sample at ``t`` [B], int64 [B]; None: there is but one."""
        return None

    def for_interval(self, high: float, low: float) -> "Denoiser":
        """Return what scores the times between ``high`` and ``low``: one of `parts` where it scores them all."""
        return self

    def checkpoint_activations(self, run: Callable[..., Any]) -> bool:
        """Recompute activations in the backward pass through ``run(module, *args)``; False where it is not used."""
        return False

    def feature_blocks(self) -> Mapping[str, nn.Module]:
        """Return the blocks whose outputs a discriminator may read, by name, in order; by default there are none."""
        return {}

    def feature_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a block's features on a sample of ``latent_shape``: C, or C and the tokens' grid."""
        raise NotImplementedError

    def block_shape(self, name: str, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the features of block ``name``; by default that of all blocks, `feature_shape`."""
        return self.feature_shape(latent_shape)

    def feature_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Turn a block's output, by default tokens [B, N, C] in the grid's order, into features [B, *shape]."""
        tokens: Tensor = output
        return tokens.transpose(1, 2).reshape(len(tokens), *shape)


class Family(ABC):
    """A kind of network: its shapes, its schedule, its conditions, and where its teacher comes from.

    Args:
        path: the teacher's folder; None while there is none.
        options: the family's own settings; a name that is not in ``defaults`` is refused.

    Raises:
        UserError: an unknown option, or a value of another kind.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    meanings: ClassVar[Mapping[str, str]] = {}  # of the options; a family says those that are its own

    latent_shape: tuple[int, ...]
    prediction: Prediction = "flow"
    schedule: Schedule
    guidance_rescale: GuidanceRescale = "none"  # what the model's own pipeline does with the guided prediction
    lora_targets: list[str]  # endings of module names, as peft's target_modules
    condition_columns: list[str]  # Parquet columns that `conditions` needs

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.given = dict(options or {})
        for key, value in self.given.items():
            if key not in self.defaults:
                raise UserError(f"teacher.options.{key}: family '{self.name}' has no such option"
                                f"{nearest(key, self.defaults)}")  # fmt: skip
            kind = type(self.defaults[key])
            if kind in (int, str, bool) and (type(value) is not kind or (kind is int and value < 0)):
                raise UserError(f"teacher.options.{key}: {KINDS[kind]} is needed, not {value!r}")
        self.options: dict[str, Any] = {**self.defaults, **self.given}

    @classmethod
    def meaning(cls, option: str) -> str:
        """Return what an option means, as the family or one that it is made of says it; empty: none does."""
        said = (vars(each).get("meanings", {}).get(option) for each in cls.__mro__)
        return next((words for words in said if words), "")

    def use_lora(self, path: str) -> None:
        """Have the teacher fine-tuned: a LoRA's weights are added to its own when it is loaded.

        Args:
            path: of the LoRA's file, or of a folder with one.

        Raises:
            UserError: the family takes none.
        """
        raise UserError(f"teacher.lora: family '{self.name}' takes none; only those of diffusers' models do")

    def use_quantization(self, kind: Quantization) -> None:
        """Have the frozen teacher's layers in 8 bits where it scores and samples (`scoring_network`).

        Args:
            kind: ``int8`` or ``fp8``.

        Raises:
            UserError: the family takes none.
        """
        raise UserError(f"{QUANTIZATION_KEY}: family '{self.name}' takes none; only diffusers' transformers and its "
                        f"UNets that read text do")  # fmt: skip

    @property
    def quantization(self) -> Quantization:
        """What `use_quantization` was told."""
        return "none"

    def check_quantization(self) -> None:
        """Refuse a quantization that cannot be made here, as far as can be told without the teacher.

        Raises:
            UserError: ``teacher.quantization: ...``.
        """
        return None

    def quantization_note(self) -> str | None:
        """Return a line on how many layers are quantized and the memory before and after; None where none are.

        Nothing is loaded.
        """
        return None

    def scoring_network(self, teacher: Denoiser, device: torch.device) -> Denoiser:
        """Return the frozen network that scores and samples: by default the teacher itself.

        Args:
            teacher: as `load_teacher` returns it; it stays as it is.
            device: where it will compute.

        Raises:
            UserError: ``teacher.quantization: ...``: it cannot be made here.
        """
        return teacher

    @property
    def two_guidance_scales(self) -> bool:
        """Whether the teacher has two networks, each of which may have a guidance scale of its own."""
        return False

    @abstractmethod
    def load_teacher(self) -> Denoiser:
        """Load the frozen teacher from ``path``, in eval mode.

        Raises:
            UserError: the path is missing, or holds something else.
        """

    def outline(self) -> Denoiser:
        """Return the teacher's network for a look at its parts, where it can be without its weights.

        Raises:
            UserError: what `load_teacher` raises.
        """
        return self.load_teacher()

    def check_teacher(self) -> None:
        """Refuse a teacher that does not fit, in seconds. By default it is loaded, which is right for small ones.

        Raises:
            UserError: what `load_teacher` raises.
        """
        self.load_teacher()

    def check_conditions(self, conditions: Conditions) -> None:
        """Hold the conditions of a row of prompts against the teacher that `check_teacher` has looked at.

        Raises:
            UserError: they do not fit the network.
        """
        return None

    def teacher_files(self) -> dict[str, Path]:
        """Return the files on this machine that the denoiser is made of, by a name that does not tell where they lie.

        By default the folder's own configs and safetensors files.

        Raises:
            UserError: there is no teacher.
        """
        if self.path is None or not Path(self.path).is_dir():
            raise no_folder(Path(self.path or "."))
        return {file.name: file for file in Path(self.path).iterdir() if file.suffix in (".json", ".safetensors")}

    def teacher_revision(self) -> str | None:
        """Return the hub's commit that the teacher's files are of, where they come from it."""
        return None

    @property
    def constant_inputs(self) -> Mapping[str, float]:
        """What the network is told at every call beside its conditions, by the option that says it: part of a teacher.

        By default nothing.
        """
        return {}

    @abstractmethod
    def conditions(self, rows: Mapping[str, np.ndarray]) -> Conditions:
        """Turn prompt rows (``condition_columns`` by name, each [B, ...]) into condition tensors.

        Raises:
            UserError: a column is missing or does not fit the network.
        """

    @abstractmethod
    def unconditional(self, conditions: Conditions) -> Conditions:
        """Return the null prompt for the same batch: the same names, each of the same shape."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents [B, *latent_shape] into pictures [B, 1 or 3, H, W] in [0, 1]; points stay as they are."""

    def check_pixels(self, key: str) -> None:
        """Refuse what needs pixels, where there are none: by default, always.

        Args:
            key: of the recipe, that asks for them.

        Raises:
            UserError: the family's samples are not pictures, or it lacks what decodes them.
        """
        raise UserError(f"{key}: family '{self.name}' has no pixels: its samples are not pictures")

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents [B, *latent_shape] to pixels [B, F, 1 or 3, H, W], F frames, 1 of a picture.

        They are about -1 to 1, not clamped, so that they can be differentiated everywhere by the latents, and by these
        alone. What uses pixels asks `check_pixels` first.

        Raises:
            UserError: the family's samples are not pictures.
        """
        raise UserError(f"family '{self.name}' has no pixels: its samples are not pictures")

    @property
    def reads_text(self) -> bool:
        """Whether `encode_prompts` takes any text; else prompts come from a table, or are the family's own."""
        return False

    def encode_prompts(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
        """Turn texts into rows as `conditions` takes them.

        Raises:
            UserError: the family cannot, or its text encoder cannot be loaded.
        """
        raise UserError(f"family '{self.name}' has no text encoder")

    def check_encoder(self, key: str) -> None:
        """Refuse texts where nothing encodes them: by default, always. Nothing is loaded.

        Args:
            key: of the recipe, that gives texts.

        Raises:
            UserError: the family has no text encoder, or the teacher's folder lacks it.
        """
        raise UserError(f"{key}: it holds texts, and family '{self.name}' has no text encoder")

    def encoder_files(self) -> dict[str, Path]:
        """Return the files on this machine that `encode_prompts` uses, by a name that does not tell where they lie.

        Where the family takes pictures (`IMAGE_COLUMN`), with those of `encode_first_frames`.

        Raises:
            UserError: the family has no text encoder, or the teacher's folder lacks it.
        """
        raise UserError(f"family '{self.name}' has no text encoder")

    def cut_prompts(self, prompts: Sequence[str]) -> int | None:
        """Return how many of some texts are longer than `encode_prompts` reads; None where that cannot be told."""
        return None

    def encode_first_frames(self, pictures: Tensor) -> Tensor:
        """Turn first frames [B, 3, H, W] in [-1, 1] into the `IMAGE_COLUMN` [B, channels, f, h, w] of their rows.

        Raises:
            UserError: the family takes none.
        """
        raise UserError(f"family '{self.name}' takes no first frames")

    def teacher_times(
        self, steps: int, shift: float | None = None, shape: tuple[int, ...] | None = None
    ) -> list[float]:
        """Return the ``steps`` + 1 falling times [t_max, ..., 0] of the teacher's own many-step sampler.

        Args:
            steps: of the sampler.
            shift: of evenly spaced times toward noise; None: what the model itself has, 1 where it says nothing.
            shape: of the latents of a sample; default ``latent_shape``. A model's shift may depend on it.

        Raises:
            UserError: fewer than 1 step, or the model names a sampler that is not followed here.
        """
        return step_grid(steps, 1.0 if shift is None else shift, self.schedule.t_max)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures that `encode_pixels` takes.

        Raises:
            UserError: the family encodes none.
        """
        raise UserError(f"family '{self.name}' does not encode pictures into its latents")

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Turn pictures [B, *picture_shape] in [-1, 1] into latents [B, *latent_shape], without gradient.

        `decode` takes them back to the same pictures, in [0, 1].

        Raises:
            UserError: the family encodes none.
        """
        raise UserError(f"family '{self.name}' does not encode pictures into its latents")

    @property
    def patches(self) -> tuple[int, int, int] | None:
        """Latents of a token along frames, height and width; None where the network has no tokens."""
        return None

    @property
    def frames(self) -> int:
        """Frames of a sample: 1 for a picture."""
        return 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a picture of ``latent_shape``, in pixels."""
        return self.latent_shape[-1], self.latent_shape[-2]

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the latents of a picture of another size.

        Raises:
            UserError: the network makes none of that size.
        """
        if (width, height) != self.picture_size:
            own = "x".join(str(side) for side in self.picture_size)
            raise UserError(f"sizes: family '{self.name}' makes pictures of {own} pixels, not {width}x{height}")
        return self.latent_shape

    def sample_shape(self, frames: int | None, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of a sample of another size, for training on several.

        Args:
            frames: of the sample; None: as many as ``latent_shape`` has.
            height: of a frame, in pixels.
            width: of a frame, in pixels.

        Raises:
            UserError: the network makes none of that size; the message names the nearest, but not who asked for it.
        """
        raise UserError(f"family '{self.name}' makes samples of one size alone, {list(self.latent_shape)}")

    def resized(self, shape: tuple[int, ...]) -> Self:
        """Return the family with ``latent_shape`` another one, of `sample_shape`; what is loaded is shared."""
        other = copy.copy(self)
        other.latent_shape = tuple(shape)
        return other

    def check_latents(self) -> None:
        """Hold ``latent_shape``, after `resized`, against the teacher, if it has been looked at by `check_teacher`.

        Raises:
            UserError: ``teacher.options.latent_shape: ...``.
        """
        return

    def for_size(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Return what samples of ``latent_shape`` take of conditions of all sizes, tensors or arrays by name.

        By default everything.
        """
        return dict(conditions)

    def use_buckets(self, sizes: Sequence[tuple[int, ...]]) -> None:
        """Be told the sizes that samples have, [frames,] height and width in pixels each; by default to no effect."""
        return

    def without_buckets(self) -> Self:
        """Return the family for rows that have what they have at ``latent_shape``'s size alone; see `use_buckets`."""
        return self

    def decode_video(self, latents: Tensor) -> Tensor:
        """Turn latents [B, *latent_shape] into frames [B, F, 1 or 3, H, W] in [0, 1]."""
        return self.decode(latents)[:, None]


class EmbeddedFamily(Family):
    """A family whose small network is the project's own: built from ``options``, kept as two files.

    A teacher's folder holds ``config.json`` (family and options) and ``model.safetensors``. An option that the
    folder states need not be given again; given otherwise, it is refused by `load_teacher`.
    """

    def __init__(self, path: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, options)
        if path is not None and (Path(path) / CONFIG_FILE).is_file():
            stored = read_teacher_config(path, self.name)
            self.options = {**self.options, **{k: v for k, v in stored.items() if k not in self.given}}

    @abstractmethod
    def new_network(self, seed: int = 0) -> Denoiser:
        """Build the untrained network of ``options``; the same seed gives the same weights."""

    def outline(self) -> Denoiser:
        """Return an untrained network."""
        return self.new_network()

    def shape_for(self, width: int, height: int) -> tuple[int, ...]:
        """Return the latents' shape: a picture may be asked for enlarged by a whole factor, without smoothing."""
        own_width, own_height = self.picture_size
        factor = width // own_width
        if factor < 1 or (width, height) != (factor * own_width, factor * own_height):
            raise UserError(f"sizes: family '{self.name}' makes pictures of {own_width}x{own_height} pixels, or "
                            f"enlarged by a whole factor, not {width}x{height}")  # fmt: skip
        return self.latent_shape

    def teacher_files(self) -> dict[str, Path]:
        """Return the config and the weights."""
        read_teacher_config(self.path or ".", self.name)
        return {name: Path(self.path or ".") / name for name in (CONFIG_FILE, WEIGHTS_FILE)}

    def load_teacher(self) -> Denoiser:
        """Load the frozen teacher from ``path``.

        Raises:
            UserError: no path, a missing or unreadable file, another family, or options that contradict the folder.
        """
        if self.path is None:
            raise UserError(f"teacher.path: family '{self.name}' needs a teacher's folder; `raydmd pretrain` makes one")
        stored = read_teacher_config(self.path, self.name)
        for key, value in self.given.items():
            if key in stored and stored[key] != value:
                raise UserError(f"teacher.options.{key}: {value} given, but '{self.path}' has {stored[key]}")
        network = self.new_network()
        load_weights(network, self.path)
        return network.requires_grad_(False).eval()


def save_teacher(denoiser: Denoiser, folder: str | Path, family: str, options: Mapping[str, Any]) -> None:
    """Write a teacher's folder: its weights, then ``config.json``, each whole or not at all.

    Args:
        denoiser: the network.
        folder: made if it is not there.
        family: the family's name.
        options: all that is needed to build the network again (`Family.options`).

    Raises:
        StorageError: the disk is full or gone.
    """
    folder = Path(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
    with replacing(folder / WEIGHTS_FILE) as part:
        save_weights(weights, part)
    write_text(folder / CONFIG_FILE, json.dumps({"family": family, "options": dict(options)}, indent=2) + "\n")


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file that all may read whom the umask lets; ``save_file`` makes it 0600."""
    path.write_bytes(save(dict(weights)))


def read_teacher_config(folder: str | Path, family: str) -> dict[str, Any]:
    """Return the options that a teacher's folder states.

    Raises:
        UserError: the folder or its file is missing or unreadable, or is of another family.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise no_folder(folder)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"teacher.path: '{folder}' is no teacher's folder: it has no {CONFIG_FILE}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name, options = config["family"], dict(config["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"teacher.path: {file} is not a teacher's config (family and options)") from error
    if name != family:
        raise UserError(f"teacher.path: the teacher in '{folder}' is of family '{name}', not '{family}'")
    return options


def load_weights(denoiser: Denoiser, folder: str | Path) -> None:
    """Load a teacher's folder's weights into ``denoiser``.

    Raises:
        UserError: the file is missing, unreadable, or of another network.
    """
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"teacher.path: '{folder}' has no {WEIGHTS_FILE}")
    try:
        denoiser.load_state_dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"teacher.path: {file} is not readable: {one_line(error)}") from error
    except RuntimeError as error:
        raise UserError(f"teacher.path: {file} does not fit the network of {CONFIG_FILE}: {one_line(error)}") from error


def no_folder(folder: Path) -> UserError:
    """Return the error for a teacher's folder that is not there, with the nearest of its siblings."""
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    close = nearest(folder.name, siblings)
    return UserError(f"teacher.path: no folder '{folder}'{close if 'did you mean' in close else ''}")


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an error's message as one short line."""
    return " ".join(str(error).split())[:limit]


def require_column(rows: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return a prompt column.

    Raises:
        UserError: it is not there.
    """
    if name not in rows:
        raise UserError(f"prompts: no column '{name}'{nearest(name, rows)}")
    return rows[name]
