"""A trainer group as the controller sees it: calls go in as references and come out as references."""

from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef

from raydmd.runtime.membership.role_workers import WorkerHandle
from raydmd.runtime.workers.process_group import Rendezvous
from raydmd.runtime.workers.shares import better_counts, even_counts
from raydmd.training.messages import MicroBatch


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
        role: its name.
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

    def produce(
        self, name: str, at: int, ahead: int, arguments: tuple[Any, ...], inputs: list[list[ObjectRef]]
    ) -> Call:
        """Call the parts' ``name`` for every micro-batch; a result for each and statistics come back.

        Args:
            name: the part's method.
            at: updates of the role that come before the call.
            ahead: how many of them may be missing.
            arguments: plain values, the same for all.
            inputs: lists of one reference a micro-batch; a replica gets its own of the first list, of the next...
        """
        results, call_stats = [], []
        for worker, share in self.shares():
            if share:
                call = worker.actor.produce.options(num_returns=len(share) + 1)
                *made, stats = call.remote(name, share, at, ahead, arguments, *_own(share, inputs))
                results += made
                call_stats.append(stats)
        return Call(results, call_stats)

    def prepare(self, name: str, at: int, arguments: tuple[Any, ...], inputs: list[list[ObjectRef]]) -> Call:
        """Do as `produce`; what the parts make, they keep."""
        return Call([], [
            worker.actor.prepare.remote(name, share, at, arguments, *_own(share, inputs))
            for worker, share in self.shares()
        ])  # fmt: skip

    def update(self, at: int, inputs: list[list[ObjectRef]]) -> Call:
        """Make update ``at`` on every replica, which sum their gradients; statistics come back."""
        return Call([], [
            worker.actor.update.remote(share, at, len(inputs), *_own(share, inputs)) for worker, share in self.shares()
        ])  # fmt: skip

    def all(self, method: str, *arguments: Any) -> list[ObjectRef]:
        """Call ``method(*arguments)`` on every replica."""
        return [getattr(worker.actor, method).remote(*arguments) for worker in self.replicas]

    def one(self, method: str, *arguments: Any) -> ObjectRef:
        """Call ``method(*arguments)`` on one replica, where all would answer the same; on one that stays, if any."""
        worker = next((worker for worker in self.replicas if worker.leaving is None), self.replicas[0])
        return getattr(worker.actor, method).remote(*arguments)


def _own(share: list[MicroBatch], inputs: list[list[ObjectRef]]) -> list[ObjectRef]:
    return [given[micro.index] for given in inputs for micro in share]
