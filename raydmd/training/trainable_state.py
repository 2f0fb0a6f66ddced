"""A network's trainable weights as one vector: one optimizer kernel, one all-reduce, one average."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.adamw import adamw  # torch.optim's classes import torch's compiler: 1.5 s and 150 MB in each worker

from raydmd.config.recipe import Optimizer
from raydmd.training.collective import Collective, exact_sum
from raydmd.training.learning_rate import learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatParameters:
    """Owns weights, gradient, AdamW state and moving average of named parameters, each a single vector.

    The parameters become views into the vectors, so the network is used as before.

    Args:
        parameters: name to parameter, in a stable order; float32.
        settings: AdamW's numbers and the gradient's largest norm.
        ema: decay of the moving average; 0 keeps none.
        unbiased: the average is over the weights after each update alone, as Adam's are, and forgets those begun with.
            An expert's average starts from the teacher's weights, which is as it should be; a new network's must not.

    Attributes:
        total: updates that will be made, by which a learning rate that falls does so; None: nobody has said.
        lr: the learning rate of the last update.
        version: updates made.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: Optimizer, ema: float = 0.0, unbiased: bool = False
    ) -> None:
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.weight = torch.cat([p.detach().float().reshape(-1) for p in parameters.values()])
        self.gradient = torch.zeros_like(self.weight)
        for parameter, weight, gradient in zip(
            parameters.values(), self._views(self.weight), self._views(self.gradient), strict=True
        ):
            parameter.data, parameter.grad = weight, gradient
        self.settings, self.lr = settings, settings.lr
        self.total: int | None = None
        self.moments: dict[str, torch.Tensor] = {}  # from the first update on
        self.ema, self.unbiased, self.version = ema, unbiased, 0
        self.average = self.weight.clone() if ema else self.weight

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run an update's passes and its step; whatever ends it early, it can be made again."""
        try:
            yield
        except BaseException:
            self.gradient.zero_()
            raise

    def take_gradient(self, last: bool) -> torch.Tensor:
        """Return what the last backward passes left; ``last`` lends the buffer itself instead of a copy."""
        if last:
            return self.gradient
        taken = self.gradient.clone()
        self.gradient.zero_()
        return taken

    def step(self, gradients: list[torch.Tensor], count: int, collective: Collective, lr: float | None = None) -> float:
        """Sum the micro-batches' gradients over replicas, clip, update, average; return the gradient's norm.

        Args:
            gradients: of this replica's micro-batches.
            count: micro-batches of all replicas.
            collective: the peers.
            lr: the learning rate; None: as the settings have it.

        Raises:
            FloatingPointError: the gradient is not finite; weights and state are then untouched.
        """
        with self.attempt():
            total = exact_sum(gradients, self.gradient, count, collective)
            norm = float(total.norm())
            if not math.isfinite(norm):
                raise FloatingPointError("a gradient is not finite")
        if total is not self.gradient:
            self.gradient.copy_(total)
        clip = self.settings.clip
        if clip is not None and norm > clip:
            self.gradient.mul_(clip / norm)
        self.lr = learning_rate(self.settings, self.version, self.total) if lr is None else lr
        self._adamw()
        self.gradient.zero_()
        if self.ema:
            keep = self.ema * (1 - self.ema**self.version) / (1 - self.ema ** (self.version + 1))
            self.average.lerp_(self.weight, 1.0 - (keep if self.unbiased else self.ema))
        self.version += 1
        return norm

    def _adamw(self) -> None:
        if not self.moments:
            self.moments = {name: torch.zeros_like(self.weight) for name in MOMENTS}
        (beta1, beta2), steps = self.settings.betas, torch.tensor(float(self.version), device=self.weight.device)
        first, second = ([self.moments[name]] for name in MOMENTS)
        adamw(
            [self.weight], [self.gradient], first, second, [], [steps], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=self.lr, weight_decay=self.settings.weight_decay, eps=self.settings.eps, maximize=False,
        )  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that an update depends on: weights, moments, average, step."""
        state = {name: moment.clone() for name, moment in self.moments.items()}
        state["weight"] = self.weight.clone()
        state["version"] = torch.tensor(self.version)
        if self.ema:
            state["average"] = self.average.clone()
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what ``state`` returned.

        Raises:
            ValueError: it is of a network of another size.
        """
        if state["weight"].shape != self.weight.shape:
            raise ValueError(f"state has {state['weight'].numel()} weights, the network {self.weight.numel()}")
        self.weight.copy_(state["weight"])
        self.version = int(state["version"])
        if self.ema:
            self.average.copy_(state["average"])
        self.moments = {name: state[name].to(self.weight.device, copy=True) for name in MOMENTS if name in state}

    def averaged(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights by parameter name (the weights themselves without an average)."""
        return {name: view.clone() for name, view in zip(self.shapes, self._views(self.average), strict=True)}

    def swap_average(self) -> None:
        """Exchange weights and average in place; calling it twice changes nothing."""
        if self.ema:
            kept = self.weight.clone()
            self.weight.copy_(self.average)
            self.average.copy_(kept)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes.values(), strict=True)]
