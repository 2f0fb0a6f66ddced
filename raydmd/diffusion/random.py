"""Random numbers that belong to a sample and not to the worker that draws it.

A draw is named by a `Key` (run seed, phase, stream, update) and a sample's index in the global batch. Sample `i` owns a
fixed range of the counter of a counter-based generator (Philox 4x64), so any cut of the batch into chunks, on any
number of workers, yields the same bits.
"""

import math
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_WORDS = 4  # Philox 4x64 yields four 64-bit words at each count


@dataclass(frozen=True)
class Key:
    """The name of one global draw. Two keys that differ in any field give independent numbers.

    seed: the run's seed. phase: 1..K. stream: what the numbers are for, as "rollout" or "time". update: any integer
    that numbers the draw inside the phase.
    """

    seed: int
    phase: int
    stream: str
    update: int


def _raw(key: Key, kind: str, start: int, count: int, blocks: int) -> np.ndarray:
    """Words [count, 4 * blocks] (uint64) of samples start..start+count-1, each of which owns `blocks` counts.

    The kind of number and the size of a sample are part of the hashed name: else the second sample of one shape would
    share its words with the first of a larger shape, as in a batch of mixed resolutions.
    """
    if start < 0 or count < 0:
        raise ValueError(f"start and count must not be negative, not {start} and {count}")
    name = repr((key.seed, key.phase, key.stream, key.update, kind, blocks)).encode()
    philox_key = int.from_bytes(blake2b(name, digest_size=16).digest(), "little")
    generator = np.random.Philox(key=philox_key, counter=start * blocks)
    return np.asarray(generator.random_raw(count * blocks * _WORDS)).reshape(count, blocks * _WORDS)


def _unit(raw: np.ndarray) -> np.ndarray:
    """Words to float64 in [0, 1), on the grid of 2^-53."""
    return (raw >> np.uint64(11)) * 2.0**-53


def normal(key: Key, start: int, count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers [count, *shape] for samples start..start+count-1 of the global batch (Box-Muller).

    `normal(key, 0, 8, shape)[3:5]` and `normal(key, 3, 2, shape)` are the same bits. Computed in float64 on the CPU and
    then cast. Raises ValueError for a negative start or count.
    """
    size = math.prod(shape)
    blocks = max(1, math.ceil(size / _WORDS))
    half = blocks * _WORDS // 2
    unit = _unit(_raw(key, "normal", start, count, blocks))
    radius = np.sqrt(-2.0 * np.log(1.0 - unit[:, :half]))  # 1 - u lies in (0, 1]: the logarithm is finite
    angle = (2.0 * np.pi) * unit[:, half:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]
    return torch.from_numpy(values).to(dtype).reshape(count, *shape)


def uniform(key: Key, start: int, count: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float64 [count, *shape], for samples start..start+count-1 of the global batch.

    Independent of how the batch is cut, as `normal` is. Raises ValueError for a negative start or count.
    """
    size = math.prod(shape)
    unit = _unit(_raw(key, "uniform", start, count, max(1, math.ceil(size / _WORDS))))
    return torch.from_numpy(np.ascontiguousarray(unit[:, :size])).reshape(count, *shape)


def integer(key: Key, high: int) -> int:
    """One integer in 0..high-1 shared by the whole global batch, as the exit step of SGTS is.

    Raises ValueError if high < 1.
    """
    if high < 1:
        raise ValueError(f"high must be at least 1, not {high}")
    word = int(_raw(key, "integer", 0, 1, 1)[0, 0])
    return (word * high) >> 64  # uneven by at most high / 2^64


def permutation(key: Key, count: int) -> np.ndarray:
    """A uniformly random order of 0..count-1, int64 [count]; the same on every machine and with every numpy.

    Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, not {count}")
    words = _raw(key, "permutation", 0, math.ceil(count / _WORDS), 1).reshape(-1)[:count]
    return np.argsort(words, kind="stable")
