"""The teacher's part: guided scores, its own many-step sampling, ODE pairs. Frozen and stateless."""

from collections.abc import Sequence

import torch

from raydmd.config.recipe import Recipe
from raydmd.data.trajectories import Pairs
from raydmd.diffusion.random import Key, normal
from raydmd.errors import RunError
from raydmd.models.base import Conditions, Denoiser, Family
from raydmd.objectives.guidance import guided, with_norm_of
from raydmd.sampling.noise import initial_noise, starting_latents
from raydmd.sampling.phase import Phase
from raydmd.sampling.teacher import cut_grid, first_time, follow_ode, noise_at
from raydmd.training.score_network import ScoreNetwork


class Scorer(ScoreNetwork):
    """The frozen teacher with classifier-free guidance, u + w (c - u), and what its own pipeline does with that.

    Args:
        recipe: the run's recipe.
        family: the kind of network.
        teacher: its weights; where ``teacher.quantization`` says so, this computes by a quantized copy of them.
        phases: the run's; a frozen teacher is the same in all.
        device: where it computes.

    Raises:
        UserError: ``teacher.quantization: ...``: it cannot be made here.
    """

    role = "teacher"

    def __init__(
        self, recipe: Recipe, family: Family, teacher: Denoiser, phases: Sequence[Phase] = (),
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.recipe, self.family, self.device = recipe, family, torch.device(device)
        network = family.scoring_network(teacher, self.device)
        self.network = network.to(self.device).requires_grad_(False).eval()

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions, guidance_scale: float | None = None
    ) -> torch.Tensor:
        """Return the guided prediction, like ``x_t`` [B, ...], for ``t`` [B]; without a scale, by the recipe's.

        Of a teacher of two networks each sample has the scale of its own; a scale given is that of both.
        """
        scales = self.recipe.teacher.guidance_scales if guidance_scale is None else (guidance_scale,)
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        x_t, t = x_t.to(self.device), t.to(self.device)
        if set(scales) == {1.0} or not conditions:
            return self.network(x_t, t, conditions)
        empty = self.family.unconditional(conditions)
        both = {name: torch.cat([value, empty[name]]) for name, value in conditions.items()}
        conditional, unconditional = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        prediction = guided(conditional, unconditional, self._scale_of(scales, x_t, t))
        if (self.recipe.teacher.guidance_rescale or self.family.guidance_rescale) == "none":
            return prediction
        assert self.family.patches is not None  # `check_method` has seen to it
        return with_norm_of(conditional, prediction, self.family.patches)

    def _scale_of(self, scales: tuple[float, ...], x: torch.Tensor, t: torch.Tensor) -> float | torch.Tensor:
        """Return the guidance scale, or of two networks that of each sample's own, [B, 1, ...]."""
        part_of = self.network.part_of(t) if len(scales) > 1 else None
        if part_of is None:
            return scales[0]
        return torch.tensor(scales, device=x.device)[part_of.to(x.device)].view(-1, *[1] * (x.ndim - 1))

    def times(self, steps: int, shape: tuple[int, ...] | None = None) -> list[float]:
        """Return the ``steps`` + 1 falling times of the teacher's own sampler for latents of ``shape``.

        They are the model's (`Family.teacher_times`), unless the recipe has ``teacher.timestep_shift``.
        """
        return self.family.teacher_times(steps, self.recipe.teacher.timestep_shift, shape)

    @torch.no_grad()
    def sample(
        self, x: torch.Tensor, conditions: Conditions, *, steps: int, start: float | None = None, method: str = "heun"
    ) -> torch.Tensor:
        """Follow the guided PF-ODE from ``x`` [B, ...] at time ``start`` (default: noise at the noisiest) to 0.

        The grid is the teacher's own of ``steps`` steps, cut at ``start``; noise is taken to where that grid begins.
        Returns [points, B, ...].
        """
        times = self.times(steps, tuple(x.shape[1:]))
        if start is None:
            start = first_time(self.family, times)
            x = noise_at(self.family, x, start)
        times = cut_grid(times, start)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.predict(x, t, conditions)

        return follow_ode(self.family, predict, x.to(self.device), times, "heun" if method == "heun" else "euler")

    def preview(self, count: int, conditions: Conditions) -> torch.Tensor:
        """Return its own many-step pictures [count, C, H, W], from the noise of the students' previews."""
        noise = initial_noise(self.family, self.recipe.seed, 0, count)
        return self.family.decode(self.sample(noise, conditions, steps=self.recipe.teacher.steps)[-1])

    def pairs(self, start: int, count: int, conditions: Conditions) -> Pairs:
        """Make ODE pairs ``start .. start + count``: noise and the teacher's many-step result (DMD Sec. 3.3).

        Raises:
            RunError: a result is not finite.
        """
        numbers = normal(Key(self.recipe.seed, 0, "pairs", 0), start, count, self.family.latent_shape)
        noise = starting_latents(self.family, numbers)
        result = self.sample(noise, conditions, steps=self.recipe.teacher.steps)[-1]
        if broken := int((~result.isfinite()).flatten(1).any(1).sum()):
            raise RunError(
                f"{broken} of the teacher's ODE pairs {start} to {start + count - 1} are not finite: "
                f"look at the teacher's weights and dtype"
            )
        return Pairs(noise, result.cpu(), conditions)
