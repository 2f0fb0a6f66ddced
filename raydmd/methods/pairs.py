"""The teacher's ODE pairs, for DMD's regression (DMD Sec. 3.3)."""

from dataclasses import dataclass

import torch

from raydmd.models.protocol import Conditions


@dataclass(frozen=True)
class Pairs:
    """Noise [N, ...], the teacher's result [N, ...] and its conditions; sample i uses pair i mod N."""

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

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """Return pairs ``start .. start + count``, wrapping round."""
        index = torch.arange(start, start + count) % self.noise.shape[0]
        index = index.to(self.noise.device)
        return self.noise[index], self.result[index], {name: value[index] for name, value in self.conditions.items()}
