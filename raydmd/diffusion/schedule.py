"""The forward process x_t = alpha_t x_0 + sigma_t eps, and what follows from its two coefficients alone.

A `Schedule` owns alpha and sigma, the bridge from x_s to x_t (Phased DMD Eq. 2), every conversion between predictions,
and the posterior mean of x_s. Coefficients are float64; tensors keep their own dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from raydmd.errors import UserError, nearest

Prediction = Literal["flow", "eps", "x0", "v"]
"""What a network predicts: flow = eps - x_0, eps, x_0, or v = alpha_t eps - sigma_t x_0."""

Quantity = Literal["flow", "eps", "x0", "v", "score"]
"""A prediction, or the score grad log p(x_t) = -eps / sigma_t."""

Time = float | Tensor
"""A time in [0, t_max]: a number, or a tensor [B] with one for each sample."""


C = TypeVar("C", float, Tensor)


def broadcast(c: C, like: Tensor) -> C:
    """Give a coefficient ([] or [B]) the trailing axes, the dtype and the device of `like` ([B, ...]).

    A number stays one: what it is multiplied by gives it its dtype, and nothing is copied to a GPU.
    """
    if isinstance(c, float):
        return c
    return c.to(device=like.device, dtype=like.dtype).reshape(c.shape + (1,) * (like.ndim - c.ndim))


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself, or in float32 if it came in a half-precision dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _float64(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


@lru_cache(maxsize=4096)
def _numbers(schedule: "Schedule", t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


@dataclass(frozen=True)
class Bridge:
    """The coefficients of x_t = alpha x_s + sigma eps, that is alpha_{t|s} and sigma_{t|s} (Phased DMD Eq. 2)."""

    alpha: Tensor
    sigma: Tensor


class Schedule(ABC):
    """A forward process with alpha_0 = 1, sigma_0 = 0 and a signal-to-noise ratio that strictly falls on [0, t_max]."""

    t_max: float = 1.0

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """The signal's coefficient, float64, of t's shape."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """The noise's coefficient, float64, of t's shape."""

    def coefficients(self, t: Time) -> tuple[Any, Any]:
        """Alpha and sigma: numbers at a number (computed once: samplers ask at few times), else tensors as t."""
        return (self.alpha(t), self.sigma(t)) if isinstance(t, Tensor) else _numbers(self, t)

    def snr(self, t: Time) -> Tensor:
        """The signal-to-noise ratio (alpha_t / sigma_t)^2, float64; infinite at t = 0."""
        return (self.alpha(t) / self.sigma(t)).square()

    def bridge(self, s: Time, t: Time) -> Bridge:
        """The coefficients alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}, 0 <= s <= t, alpha_s > 0.

        sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2, factored to lose no digits as t nears s.
        """
        alpha = self.alpha(t) / self.alpha(s)
        sigma_t, carried = self.sigma(t), alpha * self.sigma(s)
        variance = (sigma_t - carried) * (sigma_t + carried)
        return Bridge(alpha, variance.clamp(min=0.0).sqrt())

    def diffuse(self, x_s: Tensor, noise: Tensor, t: Time, s: Time = 0.0) -> Tensor:
        """Diffuse x_s [B, ...] on to x_t = alpha_{t|s} x_s + sigma_{t|s} noise, in x_s's dtype."""
        bridge = self.bridge(s, t)
        x, noise = at_least_float32(x_s), at_least_float32(noise)
        return (broadcast(bridge.alpha, x) * x + broadcast(bridge.sigma, x) * noise).to(x_s.dtype)

    def denoised_pair(self, prediction: Tensor, x_t: Tensor, t: Time, source: Quantity) -> tuple[Tensor, Tensor]:
        """The pair (x_0, eps) that a prediction at x_t [B, ...] stands for, in the prediction's dtype.

        From flow and v both are finite at every t. From eps and the score, x_0 is undefined where alpha_t = 0; from
        x_0, eps is undefined where sigma_t = 0: there the prediction does not determine the other.
        Half-precision input is worked in float32. Raises ValueError for an unknown source.
        """
        x, p = at_least_float32(x_t), at_least_float32(prediction)
        alpha, sigma = self.coefficients(t)
        a, s = broadcast(alpha, x), broadcast(sigma, x)
        match source:
            case "flow":
                total = broadcast(alpha + sigma, x)
                x0, eps = (x - s * p) / total, (x + a * p) / total
            case "v":
                total = broadcast(alpha * alpha + sigma * sigma, x)
                x0, eps = (a * x - s * p) / total, (s * x + a * p) / total
            case "eps":
                x0, eps = (x - s * p) / a, p
            case "x0":
                x0, eps = p, (x - a * p) / s
            case "score":
                x0, eps = (x + s * s * p) / a, -s * p
            case _:
                raise ValueError(f"unknown prediction {source!r}: one of flow, eps, x0, v, score")
        return x0.to(prediction.dtype), eps.to(prediction.dtype)

    def convert(self, prediction: Tensor, x_t: Tensor, t: Time, source: Quantity, target: Quantity) -> Tensor:
        """A prediction at x_t [B, ...] of one kind as another kind, through the pair (x_0, eps), in its own dtype.

        Undefined only where the pair is (see `denoised_pair`), and for the score where sigma_t = 0.
        Raises ValueError for an unknown kind.
        """
        if source == target:
            return prediction
        wide = at_least_float32(prediction)
        x0, eps = self.denoised_pair(wide, x_t, t, source)
        match target:
            case "flow":
                out = eps - x0
            case "v":
                out = broadcast(self.alpha(t), wide) * eps - broadcast(self.sigma(t), wide) * x0
            case "eps":
                out = eps
            case "x0":
                out = x0
            case "score":
                out = -eps / broadcast(self.sigma(t), wide)
            case _:
                raise ValueError(f"unknown prediction {target!r}: one of flow, eps, x0, v, score")
        return out.to(prediction.dtype)

    def posterior_mean(self, prediction: Tensor, x_t: Tensor, t: Time, source: Quantity, s: Time) -> Tensor:
        """E[x_s | x_t] = alpha_s x_0 + (alpha_{t|s} sigma_s^2 / sigma_t) eps, in the prediction's dtype.

        It equals Tweedie's (x_t + sigma_{t|s}^2 score) / alpha_{t|s}, yet stays finite where alpha_t = 0. At s = 0 it
        is the prediction of x_0. t > 0.
        """
        wide = at_least_float32(prediction)
        x0, eps = self.denoised_pair(wide, x_t, t, source)
        eps_weight = self.bridge(s, t).alpha * self.sigma(s).square() / self.sigma(t)
        mean = broadcast(self.alpha(s), wide) * x0 + broadcast(eps_weight, wide) * eps
        return mean.to(prediction.dtype)


class RectifiedFlow(Schedule):
    """The straight path of rectified flow: alpha = 1 - t, sigma = t."""

    def alpha(self, t: Time) -> Tensor:
        """1 - t."""
        return 1.0 - _float64(t)

    def sigma(self, t: Time) -> Tensor:
        """The time itself."""
        return _float64(t)


class EDM(Schedule):
    """The variance-exploding process in EDM's terms: alpha = 1, sigma = t, up to t_max = sigma_max."""

    def __init__(self, sigma_max: float = 80.0) -> None:
        """Take the noise level at which sampling starts."""
        self.t_max = float(sigma_max)

    def alpha(self, t: Time) -> Tensor:
        """1 at every time."""
        return torch.ones_like(_float64(t))

    def sigma(self, t: Time) -> Tensor:
        """The time itself, which is the noise level."""
        return _float64(t)


class VariancePreserving(Schedule):
    """The discrete process of DDPM (SD, SDXL, CogVideoX), alpha^2 + sigma^2 = 1, in continuous time.

    With T noisings, t = k / T is the state after k of them: t = 0 is clean data and t = 1 the last of a scheduler's
    `alphas_cumprod`, whose entry i, which is also the timestep i given to the network, lies at t = (i + 1) / T
    (`time_of`, `timestep_of`). Between two entries log alpha^2 is linear, that is beta is constant.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Take alphas_cumprod [T]: strictly falling in (0, 1); only its last entry may be 0 (zero terminal SNR).

        Raises UserError if it is not so.
        """
        bars = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.detach().cpu().to(torch.float64)])
        if len(bars) < 2 or bool((bars[1:] >= bars[:-1]).any()) or bool(bars[-1] < 0.0):
            raise UserError("alphas_cumprod must fall strictly from below 1 and not below 0")
        self.steps = len(bars) - 1
        self._log_bars = bars.log()

    @classmethod
    def from_betas(cls, betas: Tensor) -> "VariancePreserving":
        """Make the process from the variances [T] that its steps add. Raises UserError unless 0 < beta <= 1."""
        return cls(torch.cumprod(1.0 - betas.to(torch.float64), dim=0))

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> "VariancePreserving":
        """Make DDPM's process, with betas spaced evenly."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000
    ) -> "VariancePreserving":
        """Make Stable Diffusion's process, with the square roots of the betas spaced evenly."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square())

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VariancePreserving":
        """Make the process that a diffusers scheduler's config describes.

        Reads trained_betas, beta_schedule (linear, scaled_linear), beta_start, beta_end, num_train_timesteps,
        snr_shift_scale (CogVideoX) and rescale_betas_zero_snr, with diffusers' defaults. Raises UserError for
        another beta_schedule.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            base = cls.from_betas(torch.as_tensor(config["trained_betas"], dtype=torch.float64))
        elif kind == "linear":
            base = cls.linear(start, end, steps)
        elif kind == "scaled_linear":
            base = cls.scaled_linear(start, end, steps)
        else:
            raise UserError(f"beta_schedule: {kind!r} is not known{nearest(str(kind), ['linear', 'scaled_linear'])}")
        bars = base._log_bars[1:].exp()
        shift = float(config.get("snr_shift_scale", 1.0))
        bars = bars / (shift + (1.0 - shift) * bars)
        if config.get("rescale_betas_zero_snr", False):
            alphas = bars.sqrt()
            bars = ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])).square()
        return cls(bars)

    def time_of(self, timestep: Time) -> Tensor:
        """The time of a scheduler's timestep i in 0..T-1, (i + 1) / T, float64."""
        return (_float64(timestep) + 1.0) / self.steps

    def timestep_of(self, t: Time) -> Tensor:
        """The (fractional) timestep that a network trained on this scheduler takes at time t, t T - 1, float64."""
        return _float64(t) * self.steps - 1.0

    def _log_alpha_bar(self, t: Time) -> Tensor:
        position = _float64(t) * self.steps
        index = position.floor().clamp(0, self.steps - 1)
        fraction = position - index
        table = self._log_bars.to(position.device)
        low, high = table[index.long()], table[index.long() + 1]
        # A last entry of 0 has no logarithm to interpolate: alpha itself is linear there.
        return torch.where(high.isinf(), low + 2.0 * torch.log1p(-fraction), low + fraction * (high - low))

    def alpha(self, t: Time) -> Tensor:
        """The square root of the interpolated alphas_cumprod."""
        return (0.5 * self._log_alpha_bar(t)).exp()

    def sigma(self, t: Time) -> Tensor:
        """sqrt(1 - alpha^2), without loss of digits near t = 0."""
        return (-torch.expm1(self._log_alpha_bar(t))).sqrt()
