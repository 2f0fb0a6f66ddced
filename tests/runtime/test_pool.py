"""The scorer pool with real workers: who takes what, what a loss costs, and what ends a batch."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, OwnerDiedError, RayActorError

import raydmd.runtime  # before Ray  # noqa: F401
from raydmd.config.recipe import Recipe
from raydmd.runs.run import recipe_family
from raydmd.runtime.membership.role_workers import WorkerHandle
from raydmd.runtime.workers import teacher_pool as pool_module
from raydmd.runtime.workers.base import FrozenWorker, make_part
from raydmd.runtime.workers.helpers import BESIDE
from raydmd.runtime.workers.teacher_pool import DEPTH, ScorerPool
from raydmd.runtime.workers.trainer_group import Call
from raydmd.runtime.workers.wire import from_wire, to_wire
from raydmd.training.messages import BatchId, MicroBatch, Noised, Score
from raydmd.training.teacher import Scorer

SLOW, FAST = 1.0, 0.02  # seconds


class Directed:
    """A teacher's part that does what files in its folder say.

    seconds: it sleeps that long in a call; hold: it stays in its call while this is there; raise-N: as often as this
    says, it raises on draw N. It writes the draws it was called for to the file calls.
    """

    def __init__(self, scorer: Scorer, folder: str) -> None:
        self.scorer, self.folder = scorer, Path(folder)

    def score(self, proposal: Noised) -> Score:
        self._call(proposal.batch_id.draw)
        return self.scorer.score(proposal)

    def pairs(self, start: int, count: int, conditions: Any) -> torch.Tensor:
        self._call(start)
        time.sleep(SLOW)
        return torch.zeros(count)

    def _call(self, draw: int) -> None:
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{draw}\n")
        end = time.monotonic() + 120
        while (self.folder / "hold").exists():
            if time.monotonic() > end:
                raise TimeoutError("nobody let it go")
            time.sleep(0.01)
        if (self.folder / "seconds").exists():
            time.sleep(float((self.folder / "seconds").read_text()))
        faults = self.folder.parent / f"raise-{draw}"
        if faults.exists() and (left := int(faults.read_text())):
            faults.write_text(str(left - 1))
            raise ValueError(f"no score for draw {draw}")


def make_directed(folder: str, recipe: Recipe, device: str) -> Directed:
    return Directed(make_part(Scorer, recipe, device), folder)


class Hand:
    """A worker, and how it is directed."""

    def __init__(self, number: int, recipe: Recipe, folder: Path) -> None:
        self.folder = folder / f"worker-{number}"
        self.folder.mkdir(parents=True)
        kind: Any = ray.remote(concurrency_groups={BESIDE: 1})(FrozenWorker)
        actor = kind.options(num_cpus=0.1).remote(
            "teacher", recipe, number, 1, "cpu", partial(make_directed, str(self.folder))
        )
        self.worker = WorkerHandle("teacher", number, actor, ray.get(actor.ready.remote()))

    @property
    def calls(self) -> list[int]:
        """Draws that it was called for."""
        path = self.folder / "calls"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def takes(self, seconds: float) -> None:
        (self.folder / "seconds.part").write_text(str(seconds))
        (self.folder / "seconds.part").rename(self.folder / "seconds")

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def release(self) -> None:
        (self.folder / "hold").unlink()

    def forget(self) -> None:
        (self.folder / "calls").unlink(missing_ok=True)

    def kill(self) -> None:
        os.kill(self.worker.identity.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def recipe(quick: Callable[..., Recipe]) -> Iterator[Recipe]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this file
    ray.init(
        "local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    yield quick("ring")
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def shared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> list[Hand]:
    root = tmp_path_factory.mktemp("hands")
    return [Hand(number, recipe, root) for number in range(3)]


@pytest.fixture
def hands(shared: list[Hand]) -> Iterator[list[Hand]]:
    """Three workers that outlive the tests: not to be killed."""
    yield shared
    for hand in shared:
        for path in [*hand.folder.iterdir(), *hand.folder.parent.glob("raise-*")]:
            path.unlink()
    for hand in shared:
        ray.get(hand.worker.actor.ready.remote())  # behind all that it still had
        hand.forget()


@pytest.fixture
def mortal(recipe: Recipe, tmp_path: Path) -> Hand:
    """A worker for one test."""
    return Hand(10, recipe, tmp_path)


@pytest.fixture
def nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody be late."""
    monkeypatch.setattr(pool_module, "LATE", float("inf"))


def proposals(count: int) -> list[Noised]:
    return [
        Noised(BatchId(0, draw, 0, 7), torch.full((4, 2), 0.1 * draw), torch.full((4,), 0.7, dtype=torch.float64), {})
        for draw in range(count)
    ]


def inputs(count: int) -> list[tuple[Any, ...]]:
    return [(to_wire(item),) for item in proposals(count)]


def pool_of(*hands: Hand, tries: int = 3, **options: Any) -> ScorerPool:
    pool = ScorerPool(tries, **options)
    for hand in hands:
        pool.add(hand.worker)
    return pool


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(test(), 300)

    asyncio.run(within())


async def until(condition: Callable[[], Any], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came true"
        await asyncio.sleep(0.01)


async def settle(pool: ScorerPool) -> None:
    """Wait until nobody holds anything."""
    await until(lambda: not any(pool.holds(worker) for worker in pool.workers))


async def taken(call: Call) -> Counter[int]:
    """Return how many micro-batches each worker's answers are of."""
    return Counter(stats.worker for stats in await asyncio.gather(*call.call_stats))


async def assert_scores(recipe: Recipe, call: Call, count: int) -> None:
    """The scores are the scorer's own, in the order of the inputs."""
    family = recipe_family(recipe)
    expected = Scorer(recipe, family, family.load_teacher())
    scores = [from_wire(score) for score in await asyncio.gather(*call.results)]
    assert [score.batch_id.draw for score in scores] == list(range(count))
    for item, score in zip(proposals(count), scores, strict=True):
        assert torch.equal(score.prediction, expected.score(item).prediction)


def test_results_are_in_order_whoever_makes_them(recipe: Recipe, hands: list[Hand], nothing_again: None) -> None:
    async def test() -> None:
        hands[0].takes(0.1)
        call = await pool_of(*hands).map("score", inputs(12))
        await assert_scores(recipe, call, 12)
        assert len(call.call_stats) == 12 and len(await taken(call)) == 3
        for stats in await asyncio.gather(*call.call_stats):
            assert stats.role == "teacher" and stats.micros == 1 and stats.busy_seconds > 0
        call.results.reverse()
        with pytest.raises(AssertionError):
            await assert_scores(recipe, call, 12)
        assert (await pool_of(*hands).map("score", [])).results == []

    run(test)


def test_a_free_scorer_takes_what_a_busy_one_would_wait_for(
    recipe: Recipe, hands: list[Hand], nothing_again: None
) -> None:
    async def test() -> None:
        busy, free = hands[:2]
        busy.hold()
        pool = pool_of(busy, free)
        batch = asyncio.create_task(pool.map("score", inputs(12)))
        await until(lambda: len(free.calls) == 12 - DEPTH and not pool.holds(free.worker))
        assert busy.calls == [0] and pool.holds(busy.worker) and pool.depth == 0 and not batch.done()
        busy.release()
        call = await batch
        assert await taken(call) == {0: DEPTH, 1: 12 - DEPTH}  # the busy one has what it held, and no more
        await assert_scores(recipe, call, 12)

    run(test)


def test_what_one_is_late_with_is_done_again(recipe: Recipe, hands: list[Hand]) -> None:
    async def test() -> None:
        stuck, free = hands[:2]
        stuck.hold()
        pool = pool_of(stuck, free)
        call = await pool.map("score", inputs(12))
        assert await taken(call) == {1: 12} and len(free.calls) == 12  # each of them once
        assert stuck.calls == [0] and pool.holds(stuck.worker) and pool.workers == [stuck.worker, free.worker]
        await assert_scores(recipe, call, 12)
        stuck.release()
        await settle(pool)
        assert len(stuck.calls) == DEPTH  # it answered late, and the answers were dropped
        await assert_scores(recipe, call, 12)

    run(test)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_fast_scorer_that_is_stuck_does_not_keep_a_slow_one_from_the_queue(
    hands: list[Hand], cancelled: bool
) -> None:
    async def test() -> None:
        stuck, slow = hands[:2]
        pool = await measured(pool_of(stuck, slow), slow)
        stuck.forget()
        stuck.hold()
        count = DEPTH + 1  # so that one is left for which it seems worth to wait
        if cancelled:
            batch = asyncio.create_task(pool.map("score", inputs(DEPTH)))
            await until(lambda: stuck.calls)
            batch.cancel()
            await asyncio.wait((batch,))
            count = 1
        assert slow.calls == []
        assert await taken(await pool.map("score", inputs(count))) == {1: count}

    run(test)


async def measured(pool: ScorerPool, *slow: Hand) -> ScorerPool:
    """Let a pool find out who is slow and who is fast."""
    for hand in slow:
        hand.takes(SLOW)
    await pool.map("score", inputs(3 * len(pool.workers)))
    await settle(pool)
    for hand in slow:
        assert hand.calls
        hand.forget()
    return pool


def test_a_fast_scorer_takes_more_and_a_slow_one_no_last_piece(recipe: Recipe, hands: list[Hand]) -> None:
    async def test() -> None:
        slow, fast = hands[:2]
        slow.takes(SLOW)
        fast.takes(FAST)
        unknown = pool_of(slow, fast)
        await unknown.map("score", inputs(4))
        await settle(unknown)
        assert slow.calls  # who is slow, it had to find out
        pool = await measured(unknown, slow)
        speeds = [worker.speed for worker in pool.workers]
        assert None not in speeds and speeds[0] < speeds[1]  # type: ignore[operator]
        call = await pool.map("score", inputs(3))
        assert await taken(call) == {1: 3} and slow.calls == []
        call = await pool.map("score", inputs(80))
        shares = await taken(call)
        assert shares[0] >= 1 and shares[1] >= 3 * shares[0]  # but it is not idle while there is much to do
        await assert_scores(recipe, call, 80)

    run(test)


@pytest.mark.parametrize("rested", [3, 1000])
def test_a_scorer_that_was_slow_is_measured_anew(
    hands: list[Hand], monkeypatch: pytest.MonkeyPatch, rested: int
) -> None:
    monkeypatch.setattr(pool_module, "RESTED", rested)

    async def test() -> None:
        slow, fast = hands[:2]
        fast.takes(FAST)
        pool = await measured(pool_of(slow, fast), slow)
        slow.takes(FAST)
        for _ in range(8):
            await pool.map("score", inputs(2))
            await settle(pool)
        assert bool(slow.calls) == (rested == 3)
        if slow.calls:
            assert (await taken(await pool.map("score", inputs(40))))[0] >= 4

    run(test)


def test_what_other_calls_take_says_nothing_of_scores(hands: list[Hand]) -> None:
    async def test() -> None:
        one, two = hands[:2]
        for hand in (one, two):
            hand.takes(SLOW / 10)
        pool = await measured(pool_of(one, two))
        await pool.map("pairs", [(0, 1, {})])
        await settle(pool)
        shares = await taken(await pool.map("score", inputs(4)))
        assert shares[0] and shares[1]  # one that seemed five times as slow would be given none of four

    run(test)


def test_a_killed_scorers_micro_batches_go_to_another(
    recipe: Recipe, hands: list[Hand], mortal: Hand, nothing_again: None
) -> None:
    async def test() -> None:
        losses: list[tuple[WorkerHandle, BaseException]] = []
        pool = pool_of(mortal, hands[0], lost=lambda *loss: losses.append(loss))
        mortal.hold()
        batch = asyncio.create_task(pool.map("score", inputs(8)))
        await until(lambda: mortal.calls and not pool.holds(hands[0].worker))
        assert losses == [] and not batch.done()
        mortal.kill()
        call = await batch
        assert await taken(call) == {0: 8}
        await assert_scores(recipe, call, 8)
        assert [worker for worker, _ in losses] == [mortal.worker] and isinstance(losses[0][1], RayActorError)
        assert pool.workers == [hands[0].worker] and not pool.holds(mortal.worker)

    run(test)


def test_without_scorers_it_waits_for_one(recipe: Recipe, hands: list[Hand], mortal: Hand) -> None:
    async def test() -> None:
        losses: list[WorkerHandle] = []
        pool = pool_of(mortal, lost=lambda worker, error: losses.append(worker))
        mortal.hold()
        batch = asyncio.create_task(pool.map("score", inputs(4)))
        await until(lambda: mortal.calls)
        assert pool.depth == 4 - DEPTH
        mortal.kill()
        await until(lambda: losses and pool.depth == 4)
        assert pool.workers == [] and not batch.done()
        pool.add(hands[0].worker)
        await assert_scores(recipe, await batch, 4)
        assert losses == [mortal.worker] and pool.depth == 0

    run(test)


def test_who_is_removed_finishes_what_it_holds(recipe: Recipe, hands: list[Hand], nothing_again: None) -> None:
    async def test() -> None:
        leaver, stayer = hands[:2]
        losses: list[WorkerHandle] = []
        pool = pool_of(leaver, stayer, lost=lambda worker, error: losses.append(worker))
        leaver.hold()
        batch = asyncio.create_task(pool.map("score", inputs(6)))
        await until(lambda: leaver.calls and not pool.holds(stayer.worker))
        pool.remove(leaver.worker)
        assert pool.workers == [stayer.worker] and pool.holds(leaver.worker) and not batch.done()
        leaver.release()
        call = await batch
        assert await taken(call) == {0: DEPTH, 1: 6 - DEPTH}
        await until(lambda: not pool.holds(leaver.worker))
        assert await taken(await pool.map("score", inputs(6))) == {1: 6}
        assert len(leaver.calls) == DEPTH and losses == []
        pool.add(leaver.worker)  # and it may come back
        await pool.map("score", inputs(6))
        assert len(leaver.calls) > DEPTH

    run(test)


def test_who_dies_on_its_way_out_was_not_lost(recipe: Recipe, hands: list[Hand], mortal: Hand) -> None:
    async def test() -> None:
        losses: list[WorkerHandle] = []
        pool = pool_of(mortal, lost=lambda worker, error: losses.append(worker))
        mortal.hold()
        batch = asyncio.create_task(pool.map("score", inputs(3)))
        await until(lambda: mortal.calls)
        pool.remove(mortal.worker)
        mortal.kill()
        pool.add(hands[0].worker)
        call = await batch
        assert await taken(call) == {0: 3} and losses == []
        await until(lambda: not pool.holds(mortal.worker))
        await assert_scores(recipe, call, 3)

    run(test)


def test_an_input_that_always_raises_ends_its_batch_only(
    recipe: Recipe, hands: list[Hand], nothing_again: None
) -> None:
    async def test() -> None:
        losses: list[WorkerHandle] = []
        pool = pool_of(*hands, tries=2, lost=lambda worker, error: losses.append(worker))
        faults = hands[0].folder.parent / "raise-3"
        faults.write_text("2")
        with pytest.raises(ValueError, match="no score for draw 3"):
            await pool.map("score", inputs(6))
        await settle(pool)
        assert sum(hand.calls.count(3) for hand in hands) == 2 and pool.depth == 0
        faults.write_text("1")  # once is not too often
        await assert_scores(recipe, await pool.map("score", inputs(6)), 6)
        assert len(pool.workers) == 3 and losses == []

    run(test)


def is_lost(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference)
    except OwnerDiedError:
        return True
    return False


class Origin:
    """Makes inputs, and dies."""

    def own(self) -> list[Any]:
        """Return references to what this process owns."""
        return [ray.put(inputs(1)[0][0]) for _ in range(2)]

    def stay(self) -> None:
        time.sleep(600)

    def fail(self) -> None:
        raise ValueError("no proposal")


def test_a_lost_input_ends_its_batch_at_once_and_is_no_scorers_fault(recipe: Recipe, hands: list[Hand]) -> None:
    async def test() -> None:
        losses: list[WorkerHandle] = []
        pool = pool_of(*hands, lost=lambda worker, error: losses.append(worker))
        origin, other = (ray.remote(Origin).options(num_cpus=0).remote() for _ in range(2))
        (used, owned), failed = await origin.own.remote(), other.fail.remote()
        await pool.map("score", [(used,)])  # while its owner lives, it is an input as any
        never = origin.stay.remote()
        ray.kill(origin)
        await until(lambda: is_lost(owned))
        for reference, kind in ((never, ActorDiedError), (owned, OwnerDiedError), (failed, ValueError)):
            with pytest.raises(kind):
                await pool.map("score", [*inputs(3), (reference,)])
            await settle(pool)
            assert len(pool.workers) == 3 and losses == [] and pool.depth == 0
        ray.kill(other)
        with pytest.raises(TypeError):  # an argument that cannot be sent
            await pool.map("score", [(threading.Lock(),)])
        await assert_scores(recipe, await pool.map("score", inputs(6)), 6)

    run(test)


def test_a_cancelled_batch_leaves_the_pool_usable(recipe: Recipe, hands: list[Hand]) -> None:
    async def test() -> None:
        pool = pool_of(*hands[:2])
        for hand in hands[:2]:
            hand.hold()
        reversed_inputs = inputs(9)[::-1]
        batch = asyncio.create_task(pool.map("score", reversed_inputs))
        await until(lambda: all(hand.calls for hand in hands[:2]))
        assert pool.depth == 9 - 2 * DEPTH
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert pool.depth == 0 and all(pool.holds(worker) for worker in pool.workers)
        after = asyncio.create_task(pool.map("score", inputs(6)))
        await asyncio.sleep(0)
        assert pool.depth == 6  # their hands are full of what nobody wants any more
        for hand in hands[:2]:
            hand.release()
        await assert_scores(recipe, await after, 6)
        await settle(pool)
        assert sum(len(hand.calls) for hand in hands[:2]) >= 6 + 2 * DEPTH

    run(test)


def test_a_frozen_roles_worker_takes_prompts_as_those_of_a_micro_batch(quick: Callable[..., Recipe]) -> None:
    class Echo:
        def told(self, *values: Any) -> Any:
            return [type(value).__name__ for value in values] + [getattr(values[-1], "start", None)]

    worker = FrozenWorker("teacher", quick("ring"), 0, torch.get_num_threads(), "cpu", lambda recipe, device: Echo())
    row = {"label": torch.arange(4).numpy()}
    assert worker.call("told", MicroBatch(1, 4, 4), 3, row)[0] == ["int", "PromptBatch", 4]
    assert worker.call("told", 3, row)[0] == ["int", "dict", None]
