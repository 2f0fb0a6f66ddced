"""Messages between actors: the methods' dataclasses with their tensors as numpy arrays.

Ray sends numpy arrays out of band and maps them without a copy, while a torch tensor is pickled through
``torch.save``.
"""

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch


def to_wire(message: Any) -> Any:
    """Replace every tensor in a dataclass, dict, list or tuple by a numpy array (on the CPU)."""
    return _map(message, torch.Tensor, lambda tensor: tensor.detach().cpu().numpy())


def from_wire(message: Any) -> Any:
    """Replace every numpy array by a tensor that shares its memory; it is read-only and must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return _map(message, np.ndarray, torch.from_numpy)


def _map(message: Any, kind: type, change: Any) -> Any:
    if isinstance(message, kind):
        return change(message)
    if isinstance(message, dict):
        return {key: _map(value, kind, change) for key, value in message.items()}
    if isinstance(message, list | tuple):
        return type(message)(_map(value, kind, change) for value in message)
    if dataclasses.is_dataclass(message) and not isinstance(message, type):
        names = [field.name for field in dataclasses.fields(message)]
        return type(message)(**{name: _map(getattr(message, name), kind, change) for name in names})
    return message
