"""Groups of workers as the controller sees them: calls go in as references and come out as references."""

import asyncio
from dataclasses import dataclass
from typing import Any

from ray import ObjectRef

from raydmd.runtime.workers import Micro


@dataclass(frozen=True)
class Call:
    """Results of a call on a group: one reference a micro-batch, in order, and the receipts to come."""

    results: list[ObjectRef]
    receipts: list[ObjectRef]


class TrainerGroup:
    """Data-parallel replicas that share out the micro-batches of every batch.

    Calls run on each replica in the order in which they are made here: that order, and the references that
    calls take of one another, are the schedule.
    """

    def __init__(self, workers: list[Any], micros: list[Micro]) -> None:
        self.workers, self.micros = workers, micros

    async def form(self) -> None:
        """Let the replicas find each other."""
        if len(self.workers) > 1:
            address = await self.workers[0].open_store.remote()
            joins = [w.join.remote(address, rank, len(self.workers)) for rank, w in enumerate(self.workers)]
            await asyncio.gather(*joins)

    def shares(self) -> list[list[Micro]]:
        """Return each replica's micro-batches: contiguous, and as even as can be."""
        each, rest = divmod(len(self.micros), len(self.workers))
        shares, at = [], 0
        for rank in range(len(self.workers)):
            take = each + (rank < rest)
            shares.append(self.micros[at : at + take])
            at += take
        return shares

    def produce(self, method: str, *extra: Any, inputs: list[ObjectRef]) -> Call:
        """Call ``method(micros, *extra, *inputs of those)``: a result for each micro-batch and a receipt come back."""
        results, receipts = [], []
        for worker, share in zip(self.workers, self.shares(), strict=True):
            if share:
                call = getattr(worker, method).options(num_returns=len(share) + 1)
                *made, receipt = call.remote(share, *extra, *(inputs[micro.index] for micro in share))
                results += made
                receipts.append(receipt)
        return Call(results, receipts)

    def consume(self, method: str, *extra: Any, inputs: list[list[ObjectRef]]) -> Call:
        """Call ``method(micros, *extra, *inputs of those)`` on every replica; receipts come back.

        ``inputs`` are lists of one reference a micro-batch; a replica gets its own of the first list, of the next...
        """
        receipts = []
        for worker, share in zip(self.workers, self.shares(), strict=True):
            mine = [given[micro.index] for given in inputs for micro in share]
            receipts.append(getattr(worker, method).remote(share, *extra, *mine))
        return Call([], receipts)

    def all(self, method: str, *arguments: Any) -> list[ObjectRef]:
        """Call ``method(*arguments)`` on every replica."""
        return [getattr(worker, method).remote(*arguments) for worker in self.workers]

    def one(self, method: str, *arguments: Any) -> ObjectRef:
        """Call ``method(*arguments)`` on one replica, where all would answer the same."""
        return getattr(self.workers[0], method).remote(*arguments)


class ScorerPool:
    """Stateless workers that take micro-batches as they finish: a fast one takes more.

    Args:
        workers: the actors.
        depth: micro-batches that a worker may hold at once, so that it need not wait for the next to arrive.
    """

    def __init__(self, workers: list[Any], depth: int = 2) -> None:
        self.workers = workers
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        for _ in range(depth):
            for worker in workers:
                self._free.put_nowait(worker)
        self._returning: set[asyncio.Task] = set()

    async def map(self, method: str, inputs: list[tuple[Any, ...]]) -> Call:
        """Call ``method(*input)`` for each input on whichever worker is free; return once all are taken."""
        results, receipts = [], []
        for arguments in inputs:
            worker = await self._free.get()
            result, receipt = getattr(worker, method).options(num_returns=2).remote(*arguments)
            self._give_back_after(worker, receipt)
            results.append(result)
            receipts.append(receipt)
        return Call(results, receipts)

    def _give_back_after(self, worker: Any, receipt: ObjectRef) -> None:
        async def give_back() -> None:
            await asyncio.wait([asyncio.wrap_future(receipt.future())])  # whatever became of it
            self._free.put_nowait(worker)

        task = asyncio.create_task(give_back())
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
