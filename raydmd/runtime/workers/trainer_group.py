"""A trainer group as the controller sees it: calls go in as references and come out as references."""

from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef

from raydmd.runtime.membership.role_workers import WorkerHandle
from raydmd.runtime.workers.base import MicroBatch
from raydmd.runtime.workers.process_group import Rendezvous
from raydmd.runtime.workers.shares import better_counts, even_counts


@dataclass(frozen=True)
class Call:
    """Results of a call on a group: one reference a micro-batch, in order, and the calls' statistics to come."""

    results: list[ObjectRef]
    call_stats: list[ObjectRef]


@dataclass
class TrainerGroup:
    """Data-parallel replicas that share out the micro-batches of every batch.

    Calls run on each replica in the order in which they are made here: that order, and the references that
    calls take of one another, are the schedule.

    Args:
        role: generator or fake.
        micros: the micro-batches of the global batch.
        rendezvous: where replicas find each other.
    """

    role: str
    micros: list[MicroBatch]
    rendezvous: Rendezvous
    replicas: list[WorkerHandle] = field(default_factory=list)
    generation: int = 0
    counts: list[int] = field(default_factory=list)

    def form(self, replicas: list[WorkerHandle]) -> list[ObjectRef]:
        """Let these be the replicas from here on; return references to their meeting."""
        self.replicas, self.generation = list(replicas), self.generation + 1
        self.counts = even_counts(len(self.micros), len(replicas))
        self.share_out()
        address, world = self.rendezvous.address, len(replicas)
        return [m.actor.join.remote(self.generation, address, rank, world) for rank, m in enumerate(replicas)]

    def share_out(self) -> None:
        """Cut the batch anew if replicas' measured speeds make it worth while. Not within an iteration."""
        self.counts = better_counts(self.counts, [worker.speed for worker in self.replicas])

    def shares(self) -> list[tuple[WorkerHandle, list[MicroBatch]]]:
        """Return each replica's contiguous micro-batches."""
        shares, at = [], 0
        for worker, count in zip(self.replicas, self.counts, strict=True):
            shares.append((worker, self.micros[at : at + count]))
            at += count
        return shares

    def produce(self, method: str, *extra: Any, inputs: list[ObjectRef]) -> Call:
        """Call ``method(micros, *extra, *inputs of those)``: a result for each micro-batch and statistics come back."""
        results, call_stats = [], []
        for worker, share in self.shares():
            if share:
                call = getattr(worker.actor, method).options(num_returns=len(share) + 1)
                *made, stats = call.remote(share, *extra, *(inputs[micro.index] for micro in share))
                results += made
                call_stats.append(stats)
        return Call(results, call_stats)

    def consume(self, method: str, *extra: Any, inputs: list[list[ObjectRef]]) -> Call:
        """Call ``method(micros, *extra, *inputs of those)`` on every replica; statistics come back.

        ``inputs`` are lists of one reference a micro-batch; a replica gets its own of the first list, of the next...
        """
        call_stats = []
        for worker, share in self.shares():
            mine = [given[micro.index] for given in inputs for micro in share]
            call_stats.append(getattr(worker.actor, method).remote(share, *extra, *mine))
        return Call([], call_stats)

    def all(self, method: str, *arguments: Any) -> list[ObjectRef]:
        """Call ``method(*arguments)`` on every replica."""
        return [getattr(worker.actor, method).remote(*arguments) for worker in self.replicas]

    def one(self, method: str, *arguments: Any) -> ObjectRef:
        """Call ``method(*arguments)`` on one replica, where all would answer the same; on one that stays, if any."""
        worker = next((worker for worker in self.replicas if worker.leaving is None), self.replicas[0])
        return getattr(worker.actor, method).remote(*arguments)
