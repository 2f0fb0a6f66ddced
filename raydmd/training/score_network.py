"""What the teacher and the fake score answer alike: scores, a step of their ODE, and derivatives through either."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from raydmd.diffusion.solvers import euler_step
from raydmd.models.base import Conditions, Family
from raydmd.training.messages import BatchId, Cotangents, Noised, Score, Stepped

DERIVATIVES = ("vjp", "step_vjp")
"""Calls that differentiate through the network."""


class ScoreNetwork(ABC):
    """A network that predicts at noisy latents. Derivatives are taken by the latents alone: no gradient of a weight is
    touched, and no graph is kept between calls, each of which computes anew what it differentiates."""

    role: ClassVar[str]
    family: Family
    device: torch.device

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return the prediction, like ``x_t`` [B, ...], for ``t`` [B]; it can be differentiated where that is on."""

    def with_version(self, batch_id: BatchId) -> BatchId:
        """Return the name of a micro-batch with what this network is to be blamed for."""
        return batch_id

    @torch.no_grad()
    def score(self, proposal: Noised) -> Score:
        """Predict on the generator's proposal."""
        return Score(self.with_version(proposal.batch_id), self._at(proposal)(proposal.x_t.to(self.device)))

    def vjp(self, proposal: Noised, cotangents: Cotangents) -> Cotangents:
        """Take the derivative by this role's prediction on the proposal on to the proposal's x_t.

        Args:
            proposal: where the prediction was made.
            cotangents: the derivatives by the predictions, this role's among them.
        """
        gradient = vector_jacobian(self._at(proposal), proposal.x_t.to(self.device), cotangents.values[self.role])
        return Cotangents(self.with_version(proposal.batch_id), self.role, {"x_t": gradient})

    @torch.no_grad()
    def step(self, dt: float, steps: int, proposal: Noised) -> Stepped:
        """Follow the probability-flow ODE from the proposal for ``steps`` steps of length ``dt`` (DMDX Sec. 3.2)."""
        x = self._follow(dt, steps, proposal)(proposal.x_t.to(self.device))
        return Stepped(self.with_version(proposal.batch_id), x, proposal.t - steps * dt, proposal.conditions)

    def step_vjp(self, dt: float, steps: int, proposal: Noised, cotangents: Cotangents) -> Cotangents:
        """Take the derivative by what `step` ends at, ``x``, on to the proposal's x_t."""
        follow = self._follow(dt, steps, proposal)
        gradient = vector_jacobian(follow, proposal.x_t.to(self.device), cotangents.values["x"])
        return Cotangents(self.with_version(proposal.batch_id), self.role, {"x_t": gradient})

    def _at(self, proposal: Noised) -> Callable[[torch.Tensor], torch.Tensor]:
        t = proposal.t.to(self.device)
        conditions = {name: value.to(self.device) for name, value in proposal.conditions.items()}
        return lambda x: self.predict(x, t, conditions)

    def _follow(self, dt: float, steps: int, proposal: Noised) -> Callable[[torch.Tensor], torch.Tensor]:
        conditions = {name: value.to(self.device) for name, value in proposal.conditions.items()}

        def follow(x: torch.Tensor) -> torch.Tensor:
            for step in range(steps):
                t, t_next = (proposal.t - number * dt for number in (step, step + 1))
                prediction = self.predict(x, t.to(self.device), conditions)
                x = euler_step(self.family.schedule, prediction, x, t, t_next, self.family.prediction)
            return x

        return follow


def vector_jacobian(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, cotangent: torch.Tensor
) -> torch.Tensor:
    """Return cotangent^T d function(x) / dx, like ``x``, detached; weights' gradients are left alone."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        result = function(x)
        (gradient,) = torch.autograd.grad(result, x, cotangent.to(result))
    return gradient.detach()
