"""Experts: full copies and LoRA adapters, made from the teacher, trained one at a time."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from raydmd.errors import UserError
from raydmd.models.embedded.digits import DigitsDiT, DigitsFamily
from raydmd.models.embedded.ring import RingFamily
from raydmd.models.experts import Experts

torch.set_num_threads(1)
KINDS = ["full", "lora"]
TARGETS = DigitsFamily().lora_targets


def make_teacher(seed=0):
    network = DigitsDiT(depth=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.requires_grad_(False).eval()


def make(kind, teacher=None, count=3, rank=4, alpha=8.0, seed=0):
    return Experts(teacher or make_teacher(), count, kind, rank, alpha, TARGETS, seed)


def batch(seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x, torch.rand(count, generator=generator, dtype=torch.float64), {"label": torch.arange(count)}


def train(experts, index, steps=3, seed=0):
    """Move the expert in training by a few steps."""
    optimizer = torch.optim.SGD(experts.trainable_parameters().values(), lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        x, t, conditions = batch(seed + step)
        (experts.expert(index)(x, t, conditions) - x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_starts_as_the_teacher_exactly(kind):
    teacher, inputs = make_teacher(), batch()
    experts = make(kind, teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wanted = teacher(*inputs)
    for index in range(3):  # each after the one before has been trained
        experts.start(index)
        assert torch.equal(experts.expert(index)(*inputs), wanted)
        train(experts, index)
        assert not torch.allclose(experts.expert(index)(*inputs), wanted, atol=1e-3)
    assert torch.equal(teacher(*inputs), wanted)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_one_expert_leaves_the_others(kind):
    experts, inputs = make(kind), batch(9)
    experts.start(0)
    train(experts, 0)
    first, state = experts.expert(0)(*inputs), experts.state(0)
    experts.start(1)
    assert torch.equal(experts.expert(0)(*inputs), first)
    trainable = {id(p) for p in experts.trainable_parameters().values()}
    assert trainable == {id(p) for p in experts.parameters() if p.requires_grad}
    train(experts, 1, seed=20)
    assert torch.equal(experts.expert(0)(*inputs), first)
    assert all(torch.equal(state[name], value) for name, value in experts.state(0).items())
    assert not torch.allclose(experts.expert(1)(*inputs), first, atol=1e-3)
    assert not experts.expert(0)(*inputs).requires_grad and experts.expert(1)(*inputs).requires_grad


def test_full_experts_exist_from_their_start_on():
    teacher = make_teacher()
    size = sum(p.numel() for p in teacher.parameters())
    experts = make("full", teacher)
    for index in range(3):
        assert experts.started == list(range(index))
        assert sum(p.numel() for p in experts.parameters()) == index * size
        experts.start(index)
    assert not {id(p) for p in experts.parameters()} & {id(p) for p in teacher.parameters()}


def test_lora_shares_the_teachers_tensors_and_leaves_its_modules():
    teacher = make_teacher()
    experts = make("lora", teacher)
    experts.start(0)
    experts.start(1)
    shared = {p.data_ptr() for p in teacher.parameters()}
    frozen = [p for name, p in experts.named_parameters() if "lora_" not in name]
    assert {p.data_ptr() for p in frozen} == shared
    assert not any(isinstance(module, LoraLayer) for module in teacher.modules())
    assert sum(isinstance(module, LoraLayer) for module in experts.modules()) == 2 * 5 + 3
    extra = sum(p.numel() for p in experts.parameters()) - sum(p.numel() for p in teacher.parameters())
    assert extra == 2 * sum(p.numel() for p in experts.trainable_parameters().values())


def test_an_adapter_adds_alpha_over_rank_times_b_a():
    teacher, inputs = make_teacher(), batch(4)
    experts = make("lora", teacher, rank=4, alpha=2.0)
    experts.start(0)
    experts.start(1)
    train(experts, 1)
    state = experts.state(1)

    def merged(scale):
        weights = dict(teacher.state_dict())
        for name, a in state.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                b = state[f"{layer}.lora_B.weight"]
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * b @ a
        return functional_call(teacher, weights, inputs)

    y = experts.expert(1)(*inputs)
    assert torch.allclose(y, merged(2.0 / 4), atol=1e-5)
    assert not torch.allclose(y, merged(2.0), atol=1e-3)  # the scale forgotten, as when a file lacks its alpha
    assert not torch.allclose(y, merged(0.0), atol=1e-3)


def test_all_targets_get_adapters_that_learn():
    experts = make("lora")
    experts.start(0)
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in experts.trainable_parameters()}
    assert layers == set(TARGETS)
    train(experts, 0, steps=1)
    b = {name: p for name, p in experts.trainable_parameters().items() if "lora_B" in name}
    assert all(p.abs().max() > 0 for p in b.values())


@pytest.mark.parametrize("kind", KINDS)
def test_another_expert_between_forward_and_backward_changes_no_gradient(kind):
    """A rollout keeps the trained expert's graph, then others are called, then it is differentiated."""
    experts, inputs = make(kind), batch(1)
    experts.start(0)
    train(experts, 0)
    experts.start(1)
    train(experts, 1)

    def gradients(between):
        experts.zero_grad()
        loss = experts.expert(1)(*inputs).square().sum()
        if between:
            with torch.no_grad():
                experts.expert(0)(*batch(2))
        loss.backward()
        return {name: p.grad.clone() for name, p in experts.trainable_parameters().items() if p.grad is not None}

    plain, switched = gradients(False), gradients(True)
    assert plain and plain.keys() == switched.keys()
    assert all(torch.equal(plain[name], switched[name]) for name in plain)
    assert max(g.abs().max() for g in plain.values()) > 0


def test_a_graph_through_two_calls_with_another_expert_between():
    """Whole-graph rollouts: the first expert's result is made with the other adapter active before and after."""
    experts, (x, t, conditions) = make("lora"), batch(3)
    experts.start(0)
    train(experts, 0)
    experts.start(1)
    train(experts, 1)
    zero, one = experts.expert(0), experts.expert(1)
    full = make("full", experts._teacher[0])
    y = one(zero(one(x, t, conditions), t, conditions), t, conditions)
    experts.zero_grad()
    y.square().sum().backward()
    # the same by finite differences along the gradient, in float64
    parameters = experts.trainable_parameters()
    gradient = {name: p.grad.double() for name, p in parameters.items()}
    norm = sum(g.square().sum() for g in gradient.values()).sqrt()
    experts.double()
    original = {name: p.detach().clone() for name, p in parameters.items()}
    x, losses = x.double(), []
    for step in (-1e-5, 1e-5):
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(original[name] + step * gradient[name] / norm)
            losses.append(one(zero(one(x, t, conditions), t, conditions), t, conditions).square().sum())
    slope = (losses[1] - losses[0]) / 2e-5
    assert abs(float(slope / norm) - 1) < 1e-2
    assert full.started == []


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_through_a_file(kind, tmp_path):
    teacher, inputs = make_teacher(), batch(5)
    experts = make(kind, teacher)
    experts.start(0)
    experts.start(1)
    train(experts, 1)
    y, state = experts.expert(1)(*inputs), experts.state(1)
    assert not any("expert_" in name for name in state)
    if kind == "lora":
        assert list(state) == list(experts.trainable_parameters())
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in state)
    else:
        assert list(state) == list(teacher.state_dict())
    save_file(state, tmp_path / "expert.safetensors")
    loaded = load_file(tmp_path / "expert.safetensors")

    other = make(kind, teacher, seed=77)
    other.load_state(1, loaded)  # never started there
    assert other.started == [1] and torch.equal(other.expert(1)(*inputs), y)
    assert not any(p.requires_grad for p in other.parameters())
    other.start(1)
    assert torch.equal(other.expert(1)(*inputs), teacher(*inputs))
    other.load_state(1, loaded)
    assert torch.equal(other.expert(1)(*inputs), y)
    assert all(p.requires_grad for p in other.trainable_parameters().values())

    train(experts, 1)  # a state is a copy
    assert torch.equal(other.expert(1)(*inputs), y) and all(torch.equal(state[n], loaded[n]) for n in state)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_something_else_is_refused_by_name(kind):
    experts = make(kind)
    experts.start(0)
    state = experts.state(0)
    name = next(iter(state))
    kept = {key: value.clone() for key, value in state.items()}
    for bad, message in [
        ({k: v for k, v in state.items() if k != name}, f"weights lack '{name}'"),
        ({**state, "extra.weight": torch.zeros(1)}, "'extra.weight'"),
        ({**state, name: torch.zeros(1, 3)}, rf"'{name}' is \[1, 3\], not"),
    ]:
        with pytest.raises(UserError, match=message):
            experts.load_state(0, bad)
        assert all(torch.equal(kept[key], value) for key, value in experts.state(0).items())


def test_adapters_are_seeded():
    teacher = make_teacher()

    def first(seed, index, before=()):
        torch.manual_seed(123)
        experts = make("lora", teacher, seed=seed)
        for other in before:
            experts.start(other)
        torch.randn(7)
        experts.start(index)
        return experts.state(index)

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    reference = first(1, 1)
    assert same(reference, first(1, 1, before=(0,)))
    assert not same(reference, first(2, 1)) and not same(reference, first(1, 2))
    a = reference["blocks.0.qkv.lora_A.weight"]
    assert 0.9 / 64**0.5 < a.abs().max() <= 1 / 64**0.5  # peft's law: uniform in +-1/sqrt(fan in)

    experts = make("lora", teacher, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    experts.start(1)
    assert torch.equal(torch.get_rng_state(), state)
    train(experts, 1)
    experts.start(1)
    assert same(reference, experts.state(1))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_parameters_is_fixed(kind):
    names = []
    for starts in ((0, 1), (1, 0, 1)):
        experts = make(kind)
        for index in starts:
            experts.start(index)
        names.append(list(experts.trainable_parameters()))
    assert names[0] == names[1] and len(names[0]) == len(set(names[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_independent(kind):
    experts, inputs = make(kind), batch(6)
    experts.start(0)
    train(experts, 0)
    experts.start(1)
    train(experts, 1)
    other = copy.deepcopy(experts)
    zero, one = experts.expert(0)(*inputs), experts.expert(1)(*inputs)
    assert torch.equal(other.expert(0)(*inputs), zero)  # while the original has the other one active
    train(other, 1)
    assert torch.equal(experts.expert(1)(*inputs), one) and torch.equal(experts.expert(0)(*inputs), zero)
    assert not torch.allclose(other.expert(1)(*inputs), one, atol=1e-4)


def test_adapters_of_a_half_precision_backbone_are_float32():
    teacher = make_teacher().to(torch.bfloat16)
    experts = make("lora", teacher)
    experts.start(0)
    assert {p.dtype for p in experts.trainable_parameters().values()} == {torch.float32}
    x, t, conditions = batch()
    x = x.to(torch.bfloat16)
    y = experts.expert(0)(x, t, conditions)
    assert y.dtype == torch.bfloat16 and torch.equal(y, teacher(x, t, conditions))


@pytest.mark.parametrize("kind", KINDS)
def test_misuse(kind):
    experts = make(kind)
    with pytest.raises(ValueError, match="no expert has been started"):
        experts.trainable_parameters()
    with pytest.raises(ValueError, match="expert 0 of 0..2 has not been started"):
        experts.expert(0)
    with pytest.raises(ValueError, match="experts are 0..2, not 3"):
        experts.start(3)
    with pytest.raises(ValueError, match="not been started"):
        experts.state(1)


def test_unknown_targets():
    with pytest.raises(UserError, match="to_q.*no linear layer"):
        Experts(make_teacher(), 1, "lora", 4, 4.0, ["to_q"])
    with pytest.raises(UserError, match="did you mean 'qkv'"):
        Experts(make_teacher(), 1, "lora", 4, 4.0, ["qk"])


def test_lora_on_points():
    family = RingFamily(None, {"width": 16, "depth": 2})
    teacher = family.new_network().requires_grad_(False)
    experts = Experts(teacher, 2, "lora", 2, 2.0, family.lora_targets)
    experts.start(0)
    x, t = torch.randn(4, 2), torch.rand(4, dtype=torch.float64)
    assert torch.equal(experts.expert(0)(x, t, {}), teacher(x, t, {}))
    assert len(experts.trainable_parameters()) == 2 * 3
