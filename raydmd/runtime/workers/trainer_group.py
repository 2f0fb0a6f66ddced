"""A trainer group as the controller sees it: calls go in as references and come out as references."""

from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef

from raydmd.runtime.membership.role_workers import Member
from raydmd.runtime.workers.base import Micro
from raydmd.runtime.workers.process_group import Rendezvous
from raydmd.runtime.workers.shares import better_counts, even_counts


@dataclass(frozen=True)
class Call:
    """Results of a call on a group: one reference a micro-batch, in order, and the receipts to come."""

    results: list[ObjectRef]
    receipts: list[ObjectRef]


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
    micros: list[Micro]
    rendezvous: Rendezvous
    members: list[Member] = field(default_factory=list)
    formation: int = 0
    counts: list[int] = field(default_factory=list)

    def form(self, members: list[Member]) -> list[ObjectRef]:
        """Let these be the replicas from here on; return references to their meeting."""
        self.members, self.formation = list(members), self.formation + 1
        self.counts = even_counts(len(self.micros), len(members))
        self.share_out()
        address, world = self.rendezvous.address, len(members)
        return [m.actor.join.remote(self.formation, address, rank, world) for rank, m in enumerate(members)]

    def share_out(self) -> None:
        """Cut the batch anew if replicas' measured speeds make it worth while. Not within an iteration."""
        self.counts = better_counts(self.counts, [member.speed for member in self.members])

    def shares(self) -> list[tuple[Member, list[Micro]]]:
        """Return each replica's contiguous micro-batches."""
        shares, at = [], 0
        for member, count in zip(self.members, self.counts, strict=True):
            shares.append((member, self.micros[at : at + count]))
            at += count
        return shares

    def produce(self, method: str, *extra: Any, inputs: list[ObjectRef]) -> Call:
        """Call ``method(micros, *extra, *inputs of those)``: a result for each micro-batch and a receipt come back."""
        results, receipts = [], []
        for member, share in self.shares():
            if share:
                call = getattr(member.actor, method).options(num_returns=len(share) + 1)
                *made, receipt = call.remote(share, *extra, *(inputs[micro.index] for micro in share))
                results += made
                receipts.append(receipt)
        return Call(results, receipts)

    def consume(self, method: str, *extra: Any, inputs: list[list[ObjectRef]]) -> Call:
        """Call ``method(micros, *extra, *inputs of those)`` on every replica; receipts come back.

        ``inputs`` are lists of one reference a micro-batch; a replica gets its own of the first list, of the next...
        """
        receipts = []
        for member, share in self.shares():
            mine = [given[micro.index] for given in inputs for micro in share]
            receipts.append(getattr(member.actor, method).remote(share, *extra, *mine))
        return Call([], receipts)

    def all(self, method: str, *arguments: Any) -> list[ObjectRef]:
        """Call ``method(*arguments)`` on every replica."""
        return [getattr(member.actor, method).remote(*arguments) for member in self.members]

    def one(self, method: str, *arguments: Any) -> ObjectRef:
        """Call ``method(*arguments)`` on one replica, where all would answer the same; on one that stays, if any."""
        member = next((member for member in self.members if member.leaving is None), self.members[0])
        return getattr(member.actor, method).remote(*arguments)
