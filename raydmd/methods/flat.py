"""A network's trainable weights as one vector: one optimizer kernel, one all-reduce, one average."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from raydmd.config import Optimizer
from raydmd.methods.collective import Collective, exact_sum


class FlatParameters:
    """Owns weights, gradient, AdamW state and moving average of named parameters, each a single vector.

    The parameters become views into the vectors, so the network is used as before.

    Args:
        parameters: name to parameter, in a stable order; float32.
        settings: AdamW's numbers and the gradient's largest norm.
        ema: decay of the moving average; 0 keeps none.
        unbiased: the average is over the weights after each update alone, as Adam's are, and forgets those begun with.
            An expert's average starts from the teacher's weights, which is as it should be; a new network's must not.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: Optimizer, ema: float = 0.0, unbiased: bool = False
    ) -> None:
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.weight = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in parameters.values()]))
        self.gradient = torch.zeros_like(self.weight.data)
        self.weight.grad = self.gradient
        for parameter, weight, gradient in zip(
            parameters.values(), self._views(self.weight.data), self._views(self.gradient), strict=True
        ):
            parameter.data, parameter.grad = weight, gradient
        self.optimizer = torch.optim.AdamW(
            [self.weight],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.clip, self.ema, self.unbiased, self.version = settings.clip, ema, unbiased, 0
        self.average = self.weight.data.clone() if ema else self.weight.data

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

    def step(self, gradients: list[torch.Tensor], count: int, collective: Collective) -> float:
        """Sum the micro-batches' gradients over replicas, clip, update, average; return the gradient's norm.

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
        if self.clip is not None and norm > self.clip:
            self.gradient.mul_(self.clip / norm)
        self.optimizer.step()
        self.gradient.zero_()
        if self.ema:
            keep = self.ema * (1 - self.ema**self.version) / (1 - self.ema ** (self.version + 1))
            self.average.lerp_(self.weight.data, 1.0 - (keep if self.unbiased else self.ema))
        self.version += 1
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that an update depends on: weights, moments, average, step."""
        moments = self.optimizer.state.get(self.weight, {})
        state = {name: moments[name].clone() for name in ("exp_avg", "exp_avg_sq") if name in moments}
        state["weight"] = self.weight.data.clone()
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
        self.weight.data.copy_(state["weight"])
        self.version = int(state["version"])
        if self.ema:
            self.average.copy_(state["average"])
        self.optimizer.state.pop(self.weight, None)
        if "exp_avg" in state:
            self.optimizer.state[self.weight] = {
                "step": torch.tensor(float(self.version), device=self.weight.device),
                "exp_avg": state["exp_avg"].to(self.weight.device, copy=True),
                "exp_avg_sq": state["exp_avg_sq"].to(self.weight.device, copy=True),
            }

    def averaged(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights by parameter name (the weights themselves without an average)."""
        return {name: view.clone() for name, view in zip(self.shapes, self._views(self.average), strict=True)}

    def swap_average(self) -> None:
        """Exchange weights and average in place; calling it twice changes nothing."""
        if self.ema:
            kept = self.weight.data.clone()
            self.weight.data.copy_(self.average)
            self.average.copy_(kept)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes.values(), strict=True)]
