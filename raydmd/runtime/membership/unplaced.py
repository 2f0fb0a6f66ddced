"""Which workers Ray cannot place now, by what its nodes say that they lack room for."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import ray
from ray._private.state import state
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from raydmd.config.recipe import Role

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
    return bool(state.actor_table(actor._actor_id.hex(), None, None).get("Pid"))


def _lacking() -> dict[Shape, int]:
    """Return how many requests of each shape wait for room on a node."""
    found: dict[Shape, int] = {}
    gcs = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    for pending in get_cluster_resource_state(gcs).pending_resource_requests:
        amounts = frozenset((name, amount) for name, amount in pending.request.resources_bundle.items() if amount)
        selectors = pending.request.label_selectors
        keys = frozenset(constraint.label_key for each in selectors[:1] for constraint in each.label_constraints)
        found[amounts, keys] = found.get((amounts, keys), 0) + pending.count
    return found


def _shape(role: Role) -> Shape:
    amounts = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
    return frozenset((name, amount) for name, amount in amounts.items() if amount), frozenset(role.labels)
