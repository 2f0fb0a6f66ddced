"""Which settings may change when a run is continued: those that leave every bit of it as it was, and its length."""

from collections.abc import Callable, Iterator
from typing import Any

from raydmd.config.recipe import Recipe
from raydmd.errors import UserError
from raydmd.methods.registry import build_method, plan_phases
from raydmd.sampling.plan import plan_iterations

FREE = {
    "name", "runtime", "checkpoint", "monitor", "evaluation", "plugins",
    "pairs",  # a folder is taken only where its pairs are, to the bit, those that the run would make
    "prompts.cache_mb", "prompts.cache", "prompts.stream_workers",
    "pretrain.checkpoint_every", "pretrain.min_workers", "pretrain.max_workers", "pretrain.cpus",
}  # fmt: skip
"""Sections and keys that may be others."""
LENGTH = "iterations"


def check_same_run(kept: Recipe, given: Recipe, where: str, committed: Callable[[], int]) -> None:
    """Refuse to continue a run with a recipe that would have made other bits of what is there.

    ``iterations`` may change as far as no phase but the one in training, and later ones, becomes another. So a run may
    be given more iterations when it is finished, too: its last phase then goes on from its last manifest of before the
    phase's end.

    Args:
        kept: the run's recipe.
        given: the one to go on with.
        where: names the run in errors.
        committed: returns how many iterations the run has committed; asked only where that matters.

    Raises:
        UserError: one line that names the key, both values, and what to do.
    """
    if kept.checkpoint.path != given.checkpoint.path:
        place = kept.checkpoint.path or "its folder"
        raise UserError(f"{where}: its checkpoints are in {place}, and checkpoint.path says otherwise")
    changed = [each for each in differences(kept, given) if each[0].split(".")[0] != LENGTH]
    if changed:
        key, before, now = changed[0]
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"{where}: it holds a run of another recipe ({key}: {before} there, {now} here{more}); leave "
                        f"that as it was, or choose another place")  # fmt: skip
    _check_length(kept, given, where, committed)


def differences(kept: Recipe, given: Recipe) -> list[tuple[str, Any, Any]]:
    """Return what differs between two recipes and may not: dotted keys, each with its value in either."""

    def walk(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
        if before == now or key in FREE:
            return
        if isinstance(before, dict) and isinstance(now, dict):
            for name in dict.fromkeys([*now, *before]):
                yield from walk(f"{key}.{name}" if key else name, before.get(name), now.get(name))
        else:
            yield key, before, now

    return list(walk("", kept.model_dump(mode="json"), given.model_dump(mode="json")))


def _check_length(kept: Recipe, given: Recipe, where: str, committed: Callable[[], int]) -> None:
    phases = plan_phases(kept)
    before, now = plan_iterations(kept, phases), plan_iterations(given, phases)
    if before == now:
        return
    changed = next(index for index, length in enumerate(before) if length != now[index])
    begin, done = sum(before[:changed]), committed()
    end = begin + before[changed]
    head = f"{where}: {LENGTH}: {kept.iterations} there, {given.iterations} here"
    if done > end:
        training = next((index for index in range(len(before)) if sum(before[: index + 1]) > done), len(before) - 1)
        rest = max(1, sum(now) - sum(before[:training]) - sum(before[training + 1 :]))
        same = [*before[:training], rest, *before[training + 1 :]]
        raise UserError(f"{head}: phase {changed + 1} was trained for {before[changed]} and would have {now[changed]}; "
                        f"give one number a phase, e.g. {LENGTH}: {same}")  # fmt: skip
    if begin + now[changed] < done:
        raise UserError(f"{head}: {done} are made, and phase {changed + 1} would end at {begin + now[changed]}; choose "
                        f"{done - begin} or more for it, or another place")  # fmt: skip
    if done > begin:
        for role in build_method(kept).trained():
            if (schedule := kept.optimizer.of(role).schedule) != "constant":
                raise UserError(
                    f"{head}: optimizer.{role}.schedule: {schedule} goes by the length of phase {changed + 1}, which "
                    f"is begun; leave {LENGTH} as it was, or choose another place"
                )
