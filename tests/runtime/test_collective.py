"""The gradient's sum that no order can show, and the flat parameters that step with it."""

import math
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from raydmd.config.recipe import Optimizer
from raydmd.models.embedded.ring import PointsMLP
from raydmd.runtime.workers.base import Heartbeat, TrainerWorker
from raydmd.runtime.workers.process_group import LEFT_BEHIND, Begun, ProcessGroup, Rendezvous, StepDropped
from raydmd.training.collective import Alone, exact_sum
from raydmd.training.trainable_state import FlatParameters


class Others:
    """The collective of one replica among several, whose peers' contributions are known."""

    def __init__(self, sums: list[Tensor], peaks: list[Tensor]) -> None:
        self.sums, self.peaks = sums, peaks

    def sum_(self, tensor: Tensor) -> Tensor:
        for other in self.sums:
            tensor += other.to(tensor.dtype)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        for other in self.peaks:
            tensor.copy_(torch.maximum(tensor, other))
        return tensor


def adversarial(count: int = 6, size: int = 2000, seed: int = 0) -> list[Tensor]:
    """Gradients whose float32 sum depends on the order: sizes from 1e-6 to 1e3, and terms that cancel."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.empty(count, size).uniform_(-6, 3, generator=generator)
    parts = torch.randn(count, size, generator=generator) * scale
    parts[1] = -parts[0] * (1 + 1e-3 * torch.randn(size, generator=generator))
    return list(parts)


def alone(parts: list[Tensor], count: int | None = None) -> Tensor:
    return exact_sum(parts, torch.zeros_like(parts[0]), count or len(parts), Alone())


def one_after_another(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def over_replicas(parts: list[Tensor], shares: list[list[int]], of: int) -> Tensor:
    """What replica ``of`` ends with when replica r holds the micro-batches ``shares[r]``: an all-reduce by hand."""
    peaks = [max((parts[i].abs().max() for i in share), default=torch.tensor(0.0)).double() for share in shares]
    whole = max(peaks)
    sums = []
    for number, share in enumerate(shares):
        if number != of:
            caught: list[Tensor] = []

            class Peer:
                def sum_(self, tensor: Tensor, caught: list[Tensor] = caught) -> Tensor:
                    caught.append(tensor.clone())
                    return tensor

                def max_(self, tensor: Tensor) -> Tensor:
                    return tensor.copy_(whole)

            exact_sum([parts[i] for i in share], torch.zeros_like(parts[0]), len(parts), Peer())
            sums += caught
    peers = [peak for number, peak in enumerate(peaks) if number != of]
    return exact_sum([parts[i] for i in shares[of]], torch.zeros_like(parts[0]), len(parts), Others(sums, peers))


def test_any_order_gives_the_same_bits_and_plain_sums_do_not() -> None:
    parts = adversarial()
    orders = list(permutations(range(6)))[::37]
    exact = [alone([parts[i] for i in order]) for order in orders]
    assert all(torch.equal(exact[0], other) for other in exact[1:])
    plain = [one_after_another([parts[i] for i in order]) for order in orders]
    assert not all(torch.equal(plain[0], other) for other in plain[1:])


@pytest.mark.parametrize(
    "shares",
    [[[0, 1, 2], [3, 4, 5]], [[5], [4, 3], [2, 1, 0]], [[0], [1], [2], [3], [4], [5]], [[], [0, 1, 2, 3, 4, 5], []]],
    ids=["3+3", "1+2+3", "six", "idle"],
)
def test_any_split_over_replicas_gives_the_same_bits_on_all_of_them(shares: list[list[int]]) -> None:
    parts = adversarial(seed=1)
    expected = alone(parts)
    for replica in range(len(shares)):
        assert torch.equal(over_replicas(parts, shares, replica), expected)
    plain = [one_after_another([parts[i] for i in share]) for share in shares if share]
    assert not torch.equal(one_after_another(plain), expected)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1.0, 1e20, 1e30])
def test_it_is_as_exact_as_float32_can_say(scale: float) -> None:
    parts = [part * scale / 1e3 for part in adversarial(seed=2)]
    result = alone(parts)
    truth = torch.tensor([math.fsum(column) for column in torch.stack(parts).double().T.tolist()], dtype=torch.float64)
    peak = float(torch.stack(parts).abs().max())
    error = (result.double() - truth).abs()
    allowed = truth.abs() * 2.0**-24 + peak * 3 * 2.0**-58 + 2.0**-149  # a rounding, the grid, the smallest number
    assert bool((error <= allowed).all())
    plain = (torch.stack(parts).sum(0).double() - truth).abs()
    assert not bool((plain <= allowed).all())


@pytest.mark.parametrize("count", [2, 3, 4, 8, 9, 64])
@pytest.mark.parametrize("largest", [1.0, 1.999, 2.0**-40])
def test_it_keeps_an_elements_24_bits_down_to_the_bound_that_it_states(count: int, largest: float) -> None:
    """2^-(38 - ceil log2 count) of the largest's power of two; half of it is rounded."""
    power = 2.0 ** math.floor(math.log2(largest))
    least = 2.0 ** -(38 - math.ceil(math.log2(count))) * power * (1 + 2.0**-23)  # the last bit is set

    def kept(element: float) -> bool:
        parts = [torch.tensor([largest, element])] + [torch.zeros(2)] * (count - 1)
        return float(alone(parts)[1]) == float(torch.tensor(element))

    assert kept(least) and kept(-least) and not kept(least / 2)


def test_zeros_and_mixed_magnitudes() -> None:
    zero = torch.zeros(5)
    assert torch.equal(alone([zero, zero, zero]), zero)
    huge, tiny = torch.tensor([1e30, 0.0, -1e30]), torch.tensor([0.0, 1e-35, 1e30])
    assert alone([huge, tiny]).tolist() == [float(huge[0]), 0.0, 0.0]  # 1e-35 is below the grid of 1e30, -0 is not
    assert torch.equal(alone([tiny, -tiny]), torch.zeros(3))
    top = torch.tensor([3e38, 1.0])
    assert alone([top, -top]).tolist() == [0.0, 0.0]  # the sum of the two halves of float32's range


def test_one_micro_batch_passes_unrounded() -> None:
    part = adversarial()[0]
    part[0], part[1] = 1e30, 1e-35
    assert torch.equal(alone([part]), part)
    assert not torch.equal(alone([part, torch.zeros_like(part)]), part)  # on the grid of the largest, 1e-35 is lost


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 3])
def test_a_gradient_that_is_not_finite_leaves_all_as_it_was(value: float, count: int) -> None:
    network = PointsMLP(2, width=8, depth=1, features=4)
    flat = FlatParameters(dict(network.named_parameters()), Optimizer(lr=1e-2), ema=0.9)
    good = [torch.full_like(flat.gradient, 0.1 * (i + 1)) for i in range(count)]
    flat.step([g.clone() for g in good], count, Alone())
    before = flat.state()
    bad = [g.clone() for g in good]
    bad[-1][3] = value
    flat.gradient.copy_(bad[-1])  # the last one is lent, as take_gradient does
    with pytest.raises(FloatingPointError):
        flat.step([*bad[:-1], flat.take_gradient(last=True)], count, Alone())
    after = flat.state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    twin = FlatParameters(
        dict(PointsMLP(2, width=8, depth=1, features=4).named_parameters()), Optimizer(lr=1e-2), ema=0.9
    )
    twin.load_state(before)
    for one in (flat, twin):  # and the step can be made again, with what was good
        for number, gradient in enumerate(good, start=1):
            if number == count:
                one.gradient += gradient
        one.step([*good[:-1], one.take_gradient(last=True)], count, Alone())
    assert torch.equal(flat.weight, twin.weight)


GROUP = """
import sys, torch
from raydmd.training.collective import exact_sum
from raydmd.runtime.workers.process_group import ProcessGroup, Rendezvous
rank, file = int(sys.argv[1]), sys.argv[2]
parts, bad = torch.load(file)
if rank == 0:
    rendezvous = Rendezvous("127.0.0.1")
    address = rendezvous.address
    print(address[1], flush=True)
else:
    address = "127.0.0.1", int(sys.stdin.readline())
group = ProcessGroup(gpu=False)
group.join(address, "fake/1", rank, 2)
mine = parts[:2] if rank == 0 else parts[2:]
total = exact_sum(mine, torch.zeros_like(parts[0]), len(parts), group)
one = exact_sum(parts[:1] if rank == 1 else [], torch.zeros_like(parts[0]), 1, group)
refused = []
for broken in bad:  # one replica has it, and both must refuse
    for owner in (0, 1):
        given = [part.clone() for part in mine]
        if rank == owner:
            given[0][5] = broken
        try:
            exact_sum(given, torch.zeros_like(parts[0]), len(parts), group)
            refused.append(False)
        except FloatingPointError:
            refused.append(True)
torch.save((total, one, refused), f"{file}.{rank}")
if rank == 0:
    sys.stdin.readline()  # the rendezvous stays until the other is done
"""


def test_two_processes_over_gloo_agree_with_one(tmp_path: Path) -> None:
    parts, file = adversarial(5, seed=3), tmp_path / "parts.pt"
    torch.save((parts, [math.nan, math.inf, -math.inf]), file)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, str(rank), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert processes[0].stdout is not None
        processes[1].communicate(processes[0].stdout.readline(), timeout=180)
        processes[0].communicate("done\n", timeout=180)
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        total, one, refused = torch.load(tmp_path / f"parts.pt.{rank}")
        assert torch.equal(total, alone(parts)) and torch.equal(one, parts[0])
        assert refused == [True] * 6


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.01)


def test_who_waits_for_a_peer_says_so(quick: Any) -> None:
    """In a meeting, to which a newcomer may come late, and in a reduction: neither is time at work."""
    worker = TrainerWorker("fake", quick("ring"), 0, torch.get_num_threads(), "cpu", lambda recipe, device: None)
    peer, rendezvous = ProcessGroup(gpu=False), Rendezvous("127.0.0.1")
    with ThreadPoolExecutor() as pool:
        try:
            joining = pool.submit(worker.join, 1, rendezvous.address, 0, 2)
            until(lambda: worker.heartbeat().waiting)
            assert worker.heartbeat().method == "join"
            peer.join(rendezvous.address, "fake/1", 1, 2)
            joining.result(60)
            assert worker.heartbeat() == Heartbeat(None, 0.0, False)
            with worker.turn("update"):
                reducing = pool.submit(worker.collective.sum_, torch.ones(1))
                until(lambda: worker.heartbeat().waiting)
                late = time.monotonic()
                peer.sum_(torch.ones(1))
                assert float(reducing.result(60)) == 2.0
                heartbeat = worker.heartbeat()
                assert heartbeat.method == "update" and not heartbeat.waiting
                assert heartbeat.seconds <= time.monotonic() - late
        finally:
            worker.drop(1)


class Telling(ProcessGroup):
    """Tells when a reduction is under way."""

    def __init__(self) -> None:
        super().__init__(gpu=False)
        self.reducing = Event()

    def _issue(self, *arguments: Any) -> Begun:
        begun = super()._issue(*arguments)
        self.reducing.set()
        return begun


def pair(pool: ThreadPoolExecutor, address: tuple[str, int], key: str) -> tuple[Telling, Telling]:
    replicas = Telling(), Telling()
    joining = [pool.submit(replica.join, address, key, rank, 2) for rank, replica in enumerate(replicas)]
    for each in joining:
        each.result(60)
    return replicas


def test_what_was_given_up_is_let_go_once_it_has_ended() -> None:
    rendezvous = Rendezvous("127.0.0.1")

    def give_up(replica: Telling) -> None:
        reducing = pool.submit(replica.sum_, torch.ones(1))
        assert replica.reducing.wait(60)
        replica.drop()
        error = reducing.exception(60)  # raised here, it would hold itself and the group
        assert isinstance(error, StepDropped) and "given up" in str(error)

    def reduce(replicas: tuple[Telling, Telling]) -> None:
        answers = [pool.submit(replica.sum_, torch.ones(1)) for replica in replicas]
        assert [float(answer.result(60)) for answer in answers] == [2.0, 2.0]

    with ThreadPoolExecutor() as pool:
        one, peer = pair(pool, rendezvous.address, "fake/1")
        give_up(one)
        group = weakref.ref(one._group)
        del one
        again = pair(pool, rendezvous.address, "fake/2")
        reduce(again)
        assert group() is not None and len(LEFT_BEHIND) == 1  # its peer may still come
        del peer

        def is_let_go() -> bool:
            reduce(again)
            return group() is None

        until(is_let_go)
        assert LEFT_BEHIND == []


def own_addresses() -> list[str]:
    """This machine's addresses, loopback first."""
    found = [each.address for of in psutil.net_if_addrs().values() for each in of if each.family == socket.AF_INET]
    return sorted(found, key=lambda address: not address.startswith("127."))


@pytest.mark.parametrize("host", own_addresses())
def test_it_listens_where_the_rendezvous_can_be_reached_whatever_the_machine_is_called(host: str) -> None:
    rendezvous = Rendezvous(host)

    def listening() -> set[Any]:
        return {each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}

    before = listening()
    with ThreadPoolExecutor() as pool:
        replicas = pair(pool, rendezvous.address, "fake/1")
        assert {address.ip for address in listening() - before} == {host} and replicas


def gradients_of(network: nn.Module, step: int, micro: int) -> Tensor:
    """A loss of some micro-batch, so that two networks of equal weights have equal gradients."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    x, y = torch.randn(8, 2, generator=generator), torch.randn(8, 2, generator=generator)
    t = torch.rand(8, generator=generator, dtype=torch.float64)
    return (network(x, t, {}) - y).square().mean() * (3.0 if step % 2 else 0.1)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
def test_it_steps_as_adamw_with_clipping_does(clip: float | None, betas: tuple[float, float]) -> None:
    settings = Optimizer(lr=3e-3, betas=betas, weight_decay=0.1, clip=clip)
    ours, theirs = (PointsMLP(2, width=16, depth=2, features=4, seed=5) for _ in range(2))
    flat = FlatParameters(dict(ours.named_parameters()), settings)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=betas, weight_decay=0.1)
    clipped = 0
    for step in range(10):
        gradients = []
        for micro in range(2):
            gradients_of(ours, step, micro).backward()
            gradients.append(flat.take_gradient(last=micro == 1))
        norm = flat.step(gradients, 2, Alone())
        adamw.zero_grad()
        sum(gradients_of(theirs, step, micro) for micro in range(2)).backward()
        reference = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        adamw.step()
        assert norm == pytest.approx(float(reference), rel=1e-5)
        clipped += clip is not None and norm > clip
    start = PointsMLP(2, width=16, depth=2, features=4, seed=5)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        # beta_1 = 0 turns a rounding near zero into a whole lr: compare what moved, not the rare elements that flipped
        close = torch.isclose(a, b, atol=2e-5, rtol=1e-5)
        assert close.double().mean() > 0.99
        assert not torch.allclose(a, c, atol=1e-3)
    assert 0 < clipped < 10 or clip is None  # both sides of the clip were seen
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in ours.parameters())


def test_clipping_scales_the_whole_gradient_to_its_norm() -> None:
    network = PointsMLP(2, width=16, depth=2, features=4)
    flat = FlatParameters(dict(network.named_parameters()), Optimizer(lr=1e-3, clip=0.5))
    for size in (0.3, 0.7, 40.0):  # with beta_1 = 0 the first moment is the gradient that was applied
        gradient = torch.randn(flat.gradient.shape, generator=torch.manual_seed(1))
        gradient *= size / gradient.norm()
        assert flat.step([gradient.clone()], 1, Alone()) == pytest.approx(size, rel=1e-5)
        assert torch.allclose(flat.state()["exp_avg"], gradient * min(1.0, 0.5 / size), rtol=1e-4, atol=1e-7)


def walk(flat: FlatParameters, network: nn.Module, steps: range) -> None:
    for step in steps:
        gradients_of(network, step, 0).backward()
        flat.step([flat.take_gradient(last=True)], 1, Alone())


def test_state_goes_there_and_back_to_the_bit() -> None:
    settings = Optimizer(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    first, second = (PointsMLP(2, width=16, depth=2, features=4, seed=seed) for seed in (1, 2))
    one = FlatParameters(dict(first.named_parameters()), settings, ema=0.9)
    walk(one, first, range(5))
    kept = one.state()
    walk(one, first, range(5, 8))
    other = FlatParameters(dict(second.named_parameters()), settings, ema=0.9)
    walk(other, second, range(3))  # whatever it was before
    other.load_state(kept)
    assert other.version == 5
    walk(other, second, range(5, 8))
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for missing in ("exp_avg_sq", "version"):  # each part of the state is needed
        wrong = FlatParameters(dict(second.named_parameters()), settings, ema=0.9)
        wrong.load_state({**kept, missing: torch.zeros_like(kept[missing])})
        walk(wrong, second, range(5, 8))
        assert not torch.equal(wrong.weight, one.weight)


def test_an_update_is_that_of_torchs_optimizer_to_the_bit() -> None:
    settings = Optimizer(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clip=None)
    network = PointsMLP(2, width=16, depth=2, features=4, seed=1)
    flat = FlatParameters(dict(network.named_parameters()), settings)
    theirs = [torch.nn.Parameter(flat.weight.clone()) for _ in range(2)]
    numbers = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "fused": True}
    right, wrong = (
        torch.optim.AdamW([theirs[0]], weight_decay=0.1, **numbers),
        torch.optim.AdamW([theirs[1]], **numbers),
    )
    for step in range(4):
        gradient = torch.randn(flat.weight.shape, generator=torch.manual_seed(step))
        for weight, optimizer in zip(theirs, (right, wrong), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        flat.step([gradient], 1, Alone())
    assert torch.equal(flat.weight, theirs[0].data) and flat.version == 4
    assert not torch.equal(flat.weight, theirs[1].data)  # with torch's own weight decay


def test_a_state_before_the_first_step_and_one_of_another_size() -> None:
    network = PointsMLP(2, width=16, depth=2, features=4, seed=1)
    flat = FlatParameters(dict(network.named_parameters()), Optimizer(lr=1e-3))
    fresh = flat.state()
    assert sorted(fresh) == ["version", "weight"]
    walk(flat, network, range(2))
    end = flat.weight.data.clone()
    flat.load_state(fresh)
    walk(flat, network, range(2))
    assert torch.equal(flat.weight, end)
    larger = PointsMLP(2, width=17, depth=2, features=4)
    with pytest.raises(ValueError, match="weights"):
        FlatParameters(dict(larger.named_parameters()), Optimizer(lr=1e-3)).load_state(fresh)


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_average_follows_by_its_decay_and_can_be_swapped(unbiased: bool) -> None:
    network = PointsMLP(2, width=16, depth=2, features=4, seed=1)
    flat = FlatParameters(dict(network.named_parameters()), Optimizer(lr=1e-2), ema=0.8, unbiased=unbiased)
    visited = [flat.weight.data.double().clone()]
    for step in range(6):
        walk(flat, network, range(step, step + 1))
        visited.append(flat.weight.data.double().clone())
    shares = [0.8**6, *(0.2 * 0.8 ** (6 - step) for step in range(1, 7))]
    if unbiased:  # none of what it began with
        visited, shares = visited[1:], [share / sum(shares[1:]) for share in shares[1:]]
    expected = sum(share * weight for share, weight in zip(shares, visited, strict=True))
    assert torch.allclose(flat.average.double(), expected, atol=1e-6)
    assert not torch.allclose(flat.average, flat.weight.data, atol=1e-3)
    weight, average = flat.weight.data.clone(), flat.average.clone()
    names = dict(network.named_parameters())
    flat.swap_average()
    assert torch.equal(flat.weight.data, average) and torch.equal(flat.average, weight)
    assert torch.equal(torch.cat([parameter.detach().reshape(-1) for parameter in names.values()]), average)
    flat.swap_average()
    assert torch.equal(flat.weight.data, weight) and torch.equal(flat.average, average)
    averaged = torch.cat([value.reshape(-1) for value in flat.averaged().values()])
    assert list(flat.averaged()) == list(names) and torch.equal(averaged, average)


def test_without_an_average_the_weights_are_it() -> None:
    network = PointsMLP(2, width=16, depth=2, features=4, seed=1)
    flat = FlatParameters(dict(network.named_parameters()), Optimizer(lr=1e-2), ema=0.0)
    walk(flat, network, range(3))
    before = flat.weight.data.clone()
    flat.swap_average()
    assert torch.equal(flat.weight.data, before)
    assert torch.equal(torch.cat([value.reshape(-1) for value in flat.averaged().values()]), before)
