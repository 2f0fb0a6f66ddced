"""The teacher's ODE pairs, for DMD's regression (DMD Sec. 3.3)."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from raydmd.data.conditions import Conditions

PAIR_CHUNK = 256
"""Pairs that the teacher computes at once, wherever they are made: another batch may change a network's last bits."""


class PairSource(Protocol):
    """Pairs that can be taken by number: in memory (`Pairs`) or in files (`raydmd.data.pair_shards`)."""

    def __len__(self) -> int:
        """Return N, the number of pairs."""

    def take(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """Return the noise, the results and the conditions of pairs by number [count], in that order."""


@dataclass(frozen=True)
class Pairs:
    """Noise [N, ...], the teacher's result [N, ...] and its conditions."""

    noise: torch.Tensor
    result: torch.Tensor
    conditions: Conditions

    @classmethod
    def join(cls, parts: "list[Pairs]", device: torch.device | str = "cpu") -> "Pairs":
        """Put consecutive parts together."""
        names = parts[0].conditions
        return cls(
            torch.cat([part.noise for part in parts]).to(device),
            torch.cat([part.result for part in parts]).to(device),
            {name: torch.cat([part.conditions[name] for part in parts]).to(device) for name in names},
        )

    def __len__(self) -> int:
        """Return N, the number of pairs."""
        return len(self.noise)

    def take(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """Return the noise, the results and the conditions of pairs by number [count], in that order."""
        index = torch.from_numpy(numbers).to(self.noise.device)
        return self.noise[index], self.result[index], {name: value[index] for name, value in self.conditions.items()}
