"""Working for a client only while it is there."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from raydmd.serving.http.errors import ApiError, ClientGone
from raydmd.serving.http.reading import while_there, within


class Client:
    """Leaves when it is told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


def run(test: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    """Run a test; nothing may be left for the loop to complain about."""
    complaints: list[dict[str, Any]] = []

    async def drive() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await test(Client())
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(drive())
    assert complaints == []


def test_work_is_done_while_the_client_is_there() -> None:
    async def test(client: Client) -> None:
        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        assert await while_there(client.receive, work()) == "done"

    run(test)


def test_a_client_that_leaves_ends_the_work_before_it_is_said() -> None:
    async def test(client: Client) -> None:
        ended = []

        async def work() -> None:
            client.left.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(True)

        with pytest.raises(ClientGone):
            async with within(60):
                await while_there(client.receive, work())
        assert ended == [True]

    run(test)


@pytest.mark.parametrize("turns", range(5))
def test_one_that_leaves_as_the_work_ends_is_no_trouble(turns: int) -> None:
    async def test(client: Client) -> None:
        async def work() -> str:
            await asyncio.sleep(0)  # somebody listens now
            client.left.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            return "done"

        try:
            assert await while_there(client.receive, work()) == "done"
        except ClientGone:
            assert turns

    run(test)


def test_the_works_own_end_is_passed_on() -> None:
    async def test(client: Client) -> None:
        async def late() -> None:
            raise TimeoutError("its own")

        async def slow() -> None:
            await asyncio.Event().wait()

        with pytest.raises(TimeoutError, match="its own"):
            await while_there(client.receive, late())
        with pytest.raises(ApiError, match="not done in 0.01 s"):
            async with within(0.01):
                await while_there(client.receive, slow())
        task = asyncio.ensure_future(while_there(client.receive, slow()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)
