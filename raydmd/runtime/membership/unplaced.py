"""Which workers Ray cannot place now, by what its nodes say that they lack room for."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from raydmd.config.recipe import Role
from raydmd.runtime.ray_compat import actor_record, pending_requests

if TYPE_CHECKING:
    from raydmd.runtime.membership.role_workers import RoleWorkers

Shape = tuple[frozenset[tuple[str, float]], frozenset[str]]  # resources and their amounts, keys of labels


def find_unplaced(role_workers: "Iterable[RoleWorkers]") -> dict[str, set[Any]]:
    """Return, by role, the workers on their way for which no node has room; the others are starting.

    Ray's nodes report what they lack room for about once a second, and the autoscaler goes by it. They tell shapes of
    requests, not whose they are: of roles that ask for the same, the first may be named for the second.
    """
    lacking: dict[Shape, int] | None = None
    found: dict[str, set[Any]] = {}
    for workers in role_workers:
        homeless = [actor for actor in workers.coming if not _has_process(actor)]
        if homeless and lacking is None:
            lacking = _lacking()
        shape, count = _shape(workers.settings), 0
        if lacking is not None:
            count = min(len(homeless), lacking.get(shape, 0))
            lacking[shape] = lacking.get(shape, 0) - count
        found[workers.role] = set(homeless[len(homeless) - count :])
    return found


def _has_process(actor: Any) -> bool:
    return bool(actor_record(actor).get("Pid"))


def _lacking() -> dict[Shape, int]:
    """Return how many requests of each shape wait for room on a node."""
    found: dict[Shape, int] = {}
    for resources, labels, count in pending_requests():
        shape = frozenset((name, amount) for name, amount in resources.items() if amount), frozenset(labels)
        found[shape] = found.get(shape, 0) + count
    return found


def _shape(role: Role) -> Shape:
    amounts = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
    return frozenset((name, amount) for name, amount in amounts.items() if amount), frozenset(role.labels)
