"""One-dimensional data for which every conditional mean is known in closed form. float64 throughout.

Nothing here uses the package: alpha and sigma come in as numbers, and the algebra is that of Gaussian mixtures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """x_0 ~ sum_i weights_i N(means_i, stds_i^2); a std of 0 is a point mass."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        w, m, d = (torch.tensor(part, dtype=torch.float64) for part in (self.weights, self.means, self.stds))
        return w, m, d

    def responsibilities(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """p(component | x_t), [N, components]."""
        w, m, d = self._parts()
        variance = alpha_t**2 * d**2 + sigma_t**2
        log_p = w.log() - 0.5 * (x_t[:, None] - alpha_t * m) ** 2 / variance - 0.5 * variance.log()
        return torch.softmax(log_p, dim=1)

    def mean_x_s(self, x_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """E[x_s | x_t], [N], for x_t [N]; with (alpha_s, sigma_s) = (1, 0) it is E[x_0 | x_t].

        Given the component, x_s ~ N(alpha_s m, alpha_s^2 d^2 + sigma_s^2) and x_t = (alpha_t / alpha_s) x_s + noise.
        """
        _, m, d = self._parts()
        variance_s = alpha_s**2 * d**2 + sigma_s**2
        variance_t = alpha_t**2 * d**2 + sigma_t**2
        gain = (alpha_t / alpha_s) * variance_s / variance_t
        per_component = alpha_s * m + gain * (x_t[:, None] - alpha_t * m)
        return (self.responsibilities(x_t, alpha_t, sigma_t) * per_component).sum(1)

    def mean_x0(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """E[x_0 | x_t], [N]."""
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        return self.mean_x_s(x_t, one, zero, alpha_t, sigma_t)

    def score(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Grad log p(x_t), [N]."""
        _, m, d = self._parts()
        variance = alpha_t**2 * d**2 + sigma_t**2
        return (self.responsibilities(x_t, alpha_t, sigma_t) * (alpha_t * m - x_t[:, None]) / variance).sum(1)


def as_prediction(kind: str, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The prediction that a pair (x_0, eps) stands for."""
    return {"flow": eps - x0, "eps": eps, "x0": x0, "v": alpha_t * eps - sigma_t * x0}[kind]


POINTS = Mixture((0.25,) * 4, (-1.0, 0.0, 1.0, 2.0), (0.0,) * 4)  # Phased DMD appendix D
OFF_CENTRE = Mixture((0.5, 0.2, 0.3), (1.5, -0.6, 3.0), (0.3, 0.15, 0.8))
