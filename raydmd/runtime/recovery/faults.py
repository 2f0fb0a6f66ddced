"""Whose fault an error is: the cluster's, from which a run recovers, or a worker's own, which comes again."""

from typing import Any

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from raydmd.errors import PortableError
from raydmd.runtime.workers.process_group import StepDropped

LOSSES_PER_FAILURE = 4  # losses without a step between, or at one micro-batch, that are borne for each failure that is


class Stopped(PortableError):
    """The run was asked to stop while it waited for workers, helpers or storage."""


def cause_of(error: BaseException) -> BaseException:
    """Return what lies under a chain of Ray's task errors."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def own_fault(error: BaseException) -> BaseException | None:
    """Return the error that a worker's own code raised; None for a lost worker, node or object, or a dropped step."""
    cause = cause_of(error)
    if isinstance(cause, OutOfMemoryError):
        return cause
    return None if isinstance(cause, RayError | StepDropped | TimeoutError) else cause


def is_gone(error: BaseException) -> bool:
    """Whether the very worker that was called is dead or cannot be reached, not one whose result it was to take."""
    # every call to an actor that Ray's memory monitor killed is answered with an OutOfMemoryError
    return isinstance(error, RayActorError | OutOfMemoryError) and not isinstance(error, RayTaskError)


def first_own_fault(errors: list[Any]) -> BaseException | None:
    """Return the first of these that is a worker's own fault."""
    return next((error for error in errors if isinstance(error, Exception) and own_fault(error) is not None), None)


def in_words(error: BaseException) -> str:
    """Say in one line why a worker was lost."""
    cause = cause_of(error)
    if isinstance(cause, ActorDiedError) and cause.preempted:
        return "its node was preempted"
    text = str(cause).strip()
    for line in text.splitlines():
        line = line.strip()
        if "exit detail" in line or "Worker exit type" in line:
            detail = line.partition(" Worker exit detail: ")[2].partition(". Some common")[0] or line
            return "its process was killed or crashed" if "connection error code 2" in detail else detail
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    if "creation task" in lines[0]:
        return lines[-1][:300]
    told = [line for line in lines if "because" in line or "node" in line.lower()]
    return (told or lines)[0][:300]
