"""What waits for the checkpoint writer, in which order it goes out, and when waiting for it ends."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from mortal import manifest
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from raydmd.errors import RunError, StorageError
from raydmd.runtime.checkpoint import queue as checkpoint_queue
from raydmd.runtime.checkpoint.manager import Manifest
from raydmd.runtime.checkpoint.queue import CheckpointQueue
from raydmd.runtime.recovery.faults import Stopped
from raydmd.runtime.recovery.helper_health import WRITER, HelperMonitor
from raydmd.runtime.workers.helpers import HelperHeartbeat


class Writer:
    """Does one call at a time, each when it is let to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.turns: asyncio.Queue[RayError | None] = asyncio.Queue()
        self.save, self.save_expert, self.restore = self, self, self

    def remote(self, what: Manifest | int | None = None, *rest: Any) -> Coroutine[Any, Any, Any]:
        return self._call(what)

    async def _call(self, what: Manifest | int | None) -> Any:
        self.begun.append(f"step {what.iteration}" if isinstance(what, Manifest) else f"{what}")
        if (error := await self.turns.get()) is not None:
            raise error
        return (what, 0.1) if isinstance(what, Manifest) else None


class Told:
    """A recorder of events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.exported = self

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def say(self, words: str) -> None:
        pass

    def checkpoint(self, size: int, seconds: float) -> None:
        pass


class Case:
    """A queue before a writer, within an event loop."""

    def __init__(self, dead_after_s: float = 60.0) -> None:
        self.writer, self.told, self.lost, self.stop = Writer(), Told(), 0, False
        self.monitor = HelperMonitor({WRITER: self.writer}, self.told, dead_after_s)  # type: ignore[arg-type]
        self.queue = CheckpointQueue(
            self.writer, self.monitor, self.told, self._lost, lambda: self.stop,  # type: ignore[arg-type]
        )  # fmt: skip

    def _lost(self) -> None:
        self.lost += 1

    def put(self, iteration: int) -> asyncio.Future[Any]:
        """Put a manifest in; return the future of its state."""
        state: asyncio.Future[Any] = asyncio.Future()
        self.queue.put_manifest(manifest(iteration), ["fake"], [state])  # type: ignore[list-item]
        return state

    def ready(self, iteration: int) -> None:
        self.put(iteration).set_result({})


def in_loop(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 20))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_of_the_manifests_that_wait_only_the_newest_is_written_and_experts_come_first() -> None:
    async def story() -> None:
        case = Case()
        case.ready(1)
        await settle()
        for iteration in (2, 3, 4):
            case.ready(iteration)
        case.queue.put_expert(0, asyncio.sleep(0))  # type: ignore[arg-type]
        await settle()
        assert case.writer.begun == ["step 1"]  # one at a time
        for _ in range(3):
            case.writer.turns.put_nowait(None)
        assert await case.queue.drain()
        assert case.writer.begun == ["step 1", "0", "step 4"]
        assert [event["iteration"] for event in case.told.events] == [1, 4]

    in_loop(story)


def test_an_edge_is_kept_until_the_states_of_a_newer_one_are_there() -> None:
    async def story() -> None:
        case = Case()
        case.ready(1)
        await settle()
        case.ready(2)
        newer, lost = case.put(3), case.put(4)
        await settle()
        lost.set_exception(ObjectLostError("0" * 56, None, ""))  # whoever was to make it died
        case.writer.turns.put_nowait(None)
        await settle()
        assert case.writer.begun == ["step 1", "step 2"] and case.lost == 1
        assert case.queue.of(4) is None  # it may be tried again
        newer.set_result({})
        for _ in range(2):
            case.writer.turns.put_nowait(None)
        assert await case.queue.drain()
        assert case.writer.begun == ["step 1", "step 2", "step 3"]

    in_loop(story)


@pytest.mark.parametrize("stop", [False, True])
def test_waiting_ends_when_the_writer_does_not_get_on(stop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_queue, "START_S", 0.1)
    monkeypatch.setattr(checkpoint_queue, "STOP_PATIENCE_S", 0.3)

    async def story() -> None:
        case = Case(60.0 if stop else 0.3)
        done = case.queue.put_expert(0, asyncio.sleep(0))  # type: ignore[arg-type]
        waiting = asyncio.create_task(case.queue.wait_for(done))
        for progress in range(6):  # it gets on, slowly: longer in all than it may stand still
            case.monitor.heard(WRITER, HelperHeartbeat(1, "save_expert", progress))
            await asyncio.sleep(0.1)
        case.stop = stop
        assert not waiting.done()
        assert await waiting is False
        assert not await case.queue.drain()
        with pytest.raises(Stopped if stop else RunError):
            await case.queue.restore()
        assert case.queue.close() == ["the expert of phase 1"]

    in_loop(story)


def test_states_that_are_on_their_way_are_waited_for() -> None:
    """The writer has nothing to do: that it does not get on says nothing."""

    async def story() -> None:
        case = Case(0.1)
        case.stop = True
        state = case.put(5)
        waiting = asyncio.create_task(case.queue.drain())
        await asyncio.sleep(0.6)
        assert not waiting.done()
        state.set_result({})
        case.writer.turns.put_nowait(None)
        assert await waiting

    in_loop(story)


def test_an_expert_that_was_not_waited_for_ends_the_run_when_it_cannot_be_written() -> None:
    async def story() -> None:
        case = Case(0.1)
        done = case.queue.put_expert(0, asyncio.sleep(0))  # type: ignore[arg-type]
        assert await case.queue.wait_for(done) is False
        case.queue.check()
        for _ in range(checkpoint_queue.TRIES):
            case.writer.turns.put_nowait(RayError("no space left"))
        assert await case.queue.drain()
        with pytest.raises(RunError, match=r"the expert of phase 1 was not written: no space left"):
            case.queue.check()
        again = case.queue.put_expert(1, asyncio.sleep(0))  # type: ignore[arg-type]
        case.writer.turns.put_nowait(RayError("no space left"))
        with pytest.raises(RayError, match="no space left"):  # whoever waits is told
            await case.queue.wait_for(again)

    in_loop(story)


def test_a_full_disk_ends_the_run_and_another_failure_only_where_it_is_the_last() -> None:
    async def story() -> None:
        case = Case()
        case.ready(1)
        case.writer.turns.put_nowait(RayTaskError("save", "", RunError("no network")))
        assert await case.queue.drain()
        case.queue.check()  # the next edge may be written
        with pytest.raises(RunError, match=r"the last checkpoint was not written \(no network\)"):
            case.queue.check_last()
        case.ready(2)
        case.writer.turns.put_nowait(None)
        assert await case.queue.drain()
        case.queue.check_last()
        case.ready(3)
        case.writer.turns.put_nowait(RayTaskError("save", "", StorageError("No space left on device")))
        assert await case.queue.drain()
        with pytest.raises(StorageError, match="^No space left on device$"):
            case.queue.check()

    in_loop(story)
