"""K experts: full copies of the teacher, or LoRA adapters on one frozen backbone (Phased DMD Sec. 2.3, Sec. 3)."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydmd.errors import UserError, nearest
from raydmd.models.adapter_files import adapter_metadata
from raydmd.models.base import Conditions, Denoiser

Expert = Callable[[Tensor, Tensor, Conditions], Tensor]
"""Called as a Denoiser is: (latents, t, conditions)."""


class Experts(nn.Module):
    """Experts 0..count-1, of which at most one is being trained; each begins as the teacher, exactly.

    ``full`` experts exist from `start` (or `load_state`) on and not before. ``lora`` experts share one frozen backbone,
    whose weights are the very tensors of the teacher (no copy), and are switched by setting the active adapter on
    each layer. Switching between a forward pass and its backward pass is safe: the graph holds the adapter's own
    weights; with recomputed activations the adapter of the forward pass is put back for the recomputation.
    Not for use by several threads at once.

    Args:
        teacher: the weights that every expert starts from. It is kept, not registered, and never changed.
        count: number of experts.
        kind: ``full`` or ``lora``.
        rank: of the adapters.
        alpha: of the adapters; their effect is scaled by alpha / rank.
        targets: endings of the names of the linear layers that get adapters.
        seed: of the adapters' initial weights; the same on every device.
        intervals: the times between which each expert is called, (high, low): of a teacher of several networks it has
            only those that score these times (`Denoiser.for_interval`). None: all experts have all of it.

    Raises:
        UserError: no layer has a name that ends in a target.
    """

    def __init__(
        self,
        teacher: Denoiser,
        count: int,
        kind: Literal["full", "lora"] = "full",
        rank: int = 64,
        alpha: float = 8.0,
        targets: Sequence[str] = (),
        seed: int = 0,
        intervals: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        self.count, self.kind, self.rank, self.alpha, self.seed = count, kind, rank, alpha, seed
        self.training_index: int | None = None
        self.intervals = intervals
        self._teacher = (teacher,)  # in a tuple, so that its weights are not this module's
        if kind == "full":
            self.networks = nn.ModuleDict()
            return
        self.endings = list(targets)
        self.targets = adapted_layers(teacher, targets)
        self.backbone = _share(teacher).requires_grad_(False)
        self._switch = _Switch()
        if getattr(self.backbone, "checkpointing", False):
            self.backbone.checkpoint_activations(_SwitchedCheckpoint(self._switch))

    @classmethod
    def of_networks(cls, networks: Sequence[Denoiser]) -> "Experts":
        """Return full experts that are these networks, in order."""
        experts = cls(networks[0], len(networks))
        for index, network in enumerate(networks):
            experts.networks[str(index)] = network
        return experts

    def expert(self, index: int) -> Expert:
        """Return expert ``index``, to be called as a Denoiser; a full expert is its network.

        Raises:
            ValueError: it has not been started.
        """
        self._check_started(index)
        if self.kind == "full":
            return self.networks[str(index)]
        return _Adapted(self._part(self.backbone, index), self._switch, _adapter(index))

    def start(self, index: int) -> None:
        """Make expert ``index`` from the teacher's weights and train it from now on; the others are frozen."""
        self._make(index)
        self.requires_grad_(False)
        for parameter in self._parameters_of(index).values():
            parameter.requires_grad_(True)
        self.training_index = index

    @property
    def started(self) -> list[int]:
        """The experts that exist, in order."""
        if self.kind == "full":
            return sorted(int(name) for name in self.networks)
        return sorted(self._switch.made)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the expert in training, by the names of `state`, in a fixed order.

        Raises:
            ValueError: none has been started.
        """
        if self.training_index is None:
            raise ValueError("no expert has been started")
        return self._parameters_of(self.training_index)

    def state(self, index: int) -> dict[str, Tensor]:
        """Return a copy of expert ``index``'s weights by name: a network's own names, or those of its LoRA layers
        (``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``), on the device that they are on.
        """
        self._check_started(index)
        tensors: Mapping[str, Tensor] = self._parameters_of(index)
        if self.kind == "full":
            tensors = self.networks[str(index)].state_dict()
        return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}

    def names(self, index: int) -> list[str]:
        """Return the names of `state`."""
        self._check_started(index)
        return list(self.networks[str(index)].state_dict() if self.kind == "full" else self._parameters_of(index))

    def metadata(self, index: int) -> dict[str, str]:
        """Return what the file of expert ``index`` says besides its tensors: of adapters, rank, alpha and targets."""
        if self.kind == "full":
            return {}
        return adapter_metadata(self._targets_of(index), self.rank, self.alpha, self.endings)

    def load_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Give expert ``index`` the weights of `state`; one that has not been started is made, frozen.

        Raises:
            UserError: a name is missing or unknown, or a shape differs.
        """
        if index not in self.started:
            self._make(index)
            for parameter in self._parameters_of(index).values():
                parameter.requires_grad_(False)
        tensors: Mapping[str, Tensor] = self._parameters_of(index)
        if self.kind == "full":
            tensors = self.networks[str(index)].state_dict()
        for name in state:
            if name not in tensors:
                raise UserError(f"expert {index}: weights have a tensor '{name}' that the {self.kind} expert has not"
                                f"{nearest(name, tensors) if len(tensors) < 8 else ''}")  # fmt: skip
        for name, value in tensors.items():
            if name not in state:
                raise UserError(f"expert {index}: weights lack '{name}'")
            if state[name].shape != value.shape:
                raise UserError(f"expert {index}: '{name}' is {list(state[name].shape)}, not {list(value.shape)}")
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(state[name])

    def _make(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise ValueError(f"experts are 0..{self.count - 1}, not {index}")
        if self.kind == "full":
            self.networks[str(index)] = copy.deepcopy(self._part(self._teacher[0], index)).requires_grad_(False)
            return
        if index not in self._switch.made:
            self._inject(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        with torch.no_grad():
            for name, parameter in self._parameters_of(index).items():
                if name.endswith("lora_B.weight"):
                    parameter.zero_()
                else:  # peft's own law, drawn on the CPU so that every device gets the same numbers
                    value = torch.empty(parameter.shape, dtype=torch.float32)
                    parameter.copy_(nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator))

    def _inject(self, index: int) -> None:
        """Add adapter ``index`` to the backbone's target layers, in float32."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        alpha: Any = self.alpha  # peft takes any number, though it says int
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=self._targets_of(index), lora_dropout=0.0)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message=".*peft_config.*")  # a second adapter is what is wanted
            inject_adapter_in_model(config, self.backbone, adapter_name=_adapter(index))
        self._switch.layers = [module for module in self.backbone.modules() if isinstance(module, LoraLayer)]
        self._switch.made.add(index)
        self._switch.active = None
        for name, parameter in self.backbone.named_parameters():
            if f".{_adapter(index)}." in name:
                parameter.data = parameter.data.float()

    def _part(self, network: Denoiser, index: int) -> Denoiser:
        """Return what of a network scores the times of expert ``index``."""
        return network if self.intervals is None else network.for_interval(*self.intervals[index])

    def _targets_of(self, index: int) -> list[str]:
        """Return the names of the linear layers that get an adapter of expert ``index``."""
        there = {name for name, _ in self._part(self.backbone, index).named_modules()}
        return [name for name in self.targets if name in there]

    def _parameters_of(self, index: int) -> dict[str, nn.Parameter]:
        if self.kind == "full":
            return dict(self.networks[str(index)].named_parameters())
        part = f".{_adapter(index)}."
        named = self.backbone.named_parameters()
        return {name.replace(part, "."): parameter for name, parameter in named if part in name}

    def _check_started(self, index: int) -> None:
        if index not in self.started:
            raise ValueError(f"expert {index} of 0..{self.count - 1} has not been started")


def adapted_layers(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the names of the linear layers that get adapters.

    Args:
        network: the teacher's.
        targets: endings of the names.

    Raises:
        UserError: no layer has a name that ends in a target.
    """
    targets = list(targets)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
    if not found:
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UserError(f"LoRA targets {targets}: no linear layer has such a name"
                        f"{nearest(targets[0] if targets else '', ends)}")  # fmt: skip
    return found


LOST = 0.01
"""Share of an adapter's effect on the weights (by norm) that rounding to half precision may take when it is fused."""


@torch.no_grad()
def fuse_lora(network: Denoiser, state: Mapping[str, Tensor], rank: int, alpha: float) -> Denoiser:
    """Add an adapter's effect, alpha / rank B A, to the weights of ``network`` itself, and return it.

    The sum is made in float32. Where the weights are of half precision it is rounded to them, and what is left of the
    effect is compared with the effect.

    Args:
        network: the teacher that the adapter was trained on.
        state: the adapter's weights by name, as `Experts.state` has them.
        rank: the adapter's.
        alpha: the adapter's.

    Raises:
        UserError: the adapter is of another network, or rounding takes more than ``LOST`` of its effect; ``network``
            is then changed in part.
    """
    modules, effect, lost, half = dict(network.named_modules()), 0.0, 0.0, None
    for name, down in state.items():
        layer, part, _ = name.rpartition(".lora_A.")
        if not part:
            continue
        up, weight = state.get(f"{layer}.lora_B.weight"), getattr(modules.get(layer), "weight", None)
        if up is None or weight is None or weight.shape != (up.shape[0], down.shape[1]) or down.shape[0] != rank:
            raise UserError(f"expert: its adapter of layer '{layer}' does not fit the teacher's network")
        delta = (alpha / rank * (up.float() @ down.float())).to(weight.device)
        if weight.dtype in (torch.float32, torch.float64):
            weight += delta.to(weight)
            continue
        before, half = weight.float(), weight.dtype
        weight.copy_(before + delta)
        effect += float(delta.double().square().sum())
        lost += float((weight.float() - before - delta).double().square().sum())
    if lost > LOST**2 * effect:
        kind = str(half).removeprefix("torch.")
        raise UserError(f"weights: fused: merged into {kind} weights, the adapter loses {math.sqrt(lost / effect):.0%} "
                        f"of its effect by rounding; use weights=switched")  # fmt: skip
    return network


def _adapter(index: int) -> str:
    return f"expert_{index}"


def _share(teacher: Denoiser) -> Denoiser:
    """Copy a network's structure, but not its tensors."""
    tensors = [*teacher.parameters(), *teacher.buffers()]
    return copy.deepcopy(teacher, {id(tensor): tensor for tensor in tensors})


class _Switch:
    """Which adapter the LoRA layers use. peft's set_adapter takes 57-73 ms at Qwen's depth; this, a twentieth."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.made: set[int] = set()
        self.active: str | None = None

    def activate(self, name: str | None) -> None:
        if name != self.active and name is not None:
            names = [name]
            for layer in self.layers:
                layer._active_adapter = names
            self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)


class _Adapted:
    """The backbone with one adapter."""

    def __init__(self, backbone: Denoiser, switch: _Switch, name: str) -> None:
        self._backbone, self._switch, self._name = backbone, switch, name

    def __call__(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        self._switch.activate(self._name)
        return self._backbone(latents, t, conditions)


class _SwitchedCheckpoint:
    """Recomputes a block with the adapter that was active in the forward pass. An object, so that copies copy it."""

    def __init__(self, switch: _Switch) -> None:
        self._switch = switch

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        name = self._switch.active

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), self._switch.using(name)

        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)
