"""A student that experts start from, instead of the teacher: weights on disk, held against the experts by headers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raydmd.errors import UserError, nearest
from raydmd.models.adapter_files import read_adapter
from raydmd.models.base import Denoiser, one_line
from raydmd.models.experts import adapted_layers
from raydmd.models.fingerprint import fingerprint_files
from raydmd.models.safetensors_files import read_header

KEY = "method.init"
T = TypeVar("T")
NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors")


def initial_file(path: str, index: int, count: int) -> Path:
    """Return the file that expert ``index`` of ``count`` starts from.

    Of a run's folder it is that of the expert with the same number; any other file, or folder with one, is for all.

    Raises:
        UserError: ``method.init: ...``: nothing there, or a run of another number of experts.
    """
    place = Path(path)
    if place.is_file():
        return place
    if not place.is_dir():
        siblings = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        close = nearest(place.name, siblings)
        raise UserError(f"{KEY}: no file or folder '{path}'{close if 'did you mean' in close else ''}")
    there = sorted((place / "experts").glob("phase-*/model.safetensors"))
    if there and len(there) != count:
        raise UserError(f"{KEY}: the run in '{path}' has {len(there)} trained experts, and the recipe's method "
                        f"{count}; name one of them, e.g. {there[-1].parent}")  # fmt: skip
    if there:
        return place / "experts" / f"phase-{index + 1}" / "model.safetensors"
    for name in NAMES:
        if (place / name).is_file():
            return place / name
    raise UserError(f"{KEY}: '{path}' is no run with trained experts, and has none of {', '.join(NAMES)}")


def check_initial(
    path: str, count: int, network: Denoiser, kind: Literal["full", "lora"], rank: int, alpha: float,
    targets: Iterable[str],
) -> None:  # fmt: skip
    """Refuse weights that do not fit, by their files' headers; nothing is loaded.

    Args:
        path: of ``method.init``.
        count: of experts.
        network: the teacher's, which may be on the meta device.
        kind: of the experts.
        rank: of their adapters.
        alpha: of their adapters.
        targets: endings of the names of the layers that have one.

    Raises:
        UserError: ``method.init: ...``: nothing there, or other tensors, shapes, rank or alpha.
    """
    expected = _expected(network, kind, rank, targets)
    for file in dict.fromkeys(initial_file(path, index, count) for index in range(count)):
        if kind == "lora" and (said := read_adapter(file)) is not None and (said.rank, said.alpha) != (rank, alpha):
            raise UserError(f"{KEY}: {file}: its adapters have rank {said.rank} and alpha {said.alpha:g}, but "
                            f"method.experts has rank {rank} and alpha {alpha:g}")  # fmt: skip
        try:
            header = read_header(file)
        except UserError as error:
            raise UserError(f"{KEY}: {str(error).removeprefix('teacher.path: ')}") from None
        found = _named(file, {name: entry.shape for name, entry in header.tensors.items()}, expected)
        for name, shape in expected.items():
            if found[name] != shape:
                raise UserError(f"{KEY}: {file}: '{name}' is {list(found[name])}, but {list(shape)} in the experts")


def fingerprint_initial(path: str, count: int) -> str:
    """Return the fingerprint of the weights that ``count`` experts start from: 32 hexadecimal digits.

    As a teacher's (`raydmd.models.fingerprint`), it goes with the files and not with their place.

    Raises:
        UserError: ``method.init: ...``: nothing there, or a file that cannot be read.
    """
    files = {str(index): initial_file(path, index, count) for index in range(count)}
    try:
        return fingerprint_files(files)
    except UserError as error:
        raise UserError(f"{KEY}: {str(error).removeprefix('teacher.path: ')}") from None


def initial_state(path: str, index: int, count: int, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights that expert ``index`` of ``count`` starts from, by the experts' own names.

    Raises:
        UserError: ``method.init: ...``: not there, not readable, other tensors, or values that are not finite.
    """
    file = initial_file(path, index, count)
    try:
        state = _named(file, load_file(file), list(names))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{KEY}: {file} is not readable as a safetensors file: {one_line(error)}") from None
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{KEY}: {file}: '{name}' has values that are not finite")
    return state


def _expected(
    network: Denoiser, kind: Literal["full", "lora"], rank: int, targets: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an expert's tensors by name."""
    if kind == "full":
        return {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {}
    modules = dict(network.named_modules())
    for name in adapted_layers(network, targets):
        layer = modules[name]
        assert isinstance(layer, nn.Linear)
        shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
    return shapes


def _named(file: Path, found: Mapping[str, T], expected: Iterable[str]) -> dict[str, T]:
    """Return a file's entries by the experts' names, which begin with the network's name in its pipeline."""
    wanted = dict.fromkeys(expected)
    prefix = f"{next(iter(wanted)).partition('.')[0]}."
    if not any(name.startswith(prefix) for name in found):  # a diffusers model's own file
        found = {f"{prefix}{name}": value for name, value in found.items()}
    if unknown := [name for name in found if name not in wanted]:
        lora = any(".lora_" in name for name in unknown)
        other = lora != any(".lora_" in name for name in wanted)
        hint = f"; it is for method.experts.kind: {'lora' if lora else 'full'}" if other else ""
        raise UserError(f"{KEY}: {file} has {len(unknown)} tensors that the experts have not, e.g. "
                        f"'{unknown[0]}'{hint}")  # fmt: skip
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{KEY}: {file} lacks {len(missing)} of the experts' {len(wanted)} tensors, e.g. "
                        f"'{missing[0]}'")  # fmt: skip
    return dict(found)
