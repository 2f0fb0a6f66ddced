"""`raydmd export`: written beside its place, checked there, and renamed; whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from raydmd.errors import UserError
from raydmd.export.card import write_card
from raydmd.export.check import Difference, check
from raydmd.export.description import describe, write_description
from raydmd.export.formats import FORMATS
from raydmd.export.plan import Plan, make_plan
from raydmd.runs.run import Run


def export_run(
    run: Run,
    format: str,
    out: Path,
    dtype: str | None = None,
    checked: bool = True,
    say: Callable[[str], None] = lambda words: None,
) -> Difference | None:
    """Export a run's experts.

    Args:
        run: finished, of a family of diffusers.
        format: ``diffusers``, ``lora``, ``peft`` or ``lightning``.
        out: the folder, which is not there yet, or empty.
        dtype: of the weights; None: the teacher's own for networks, float32 for adapters.
        checked: sample the export with plain diffusers, and compare, before it gets its name.
        say: told in a few words what is being done.

    Returns:
        What the check found; None without it.

    Raises:
        UserError: what `make_plan` refuses, or ``out`` is there.
        RunError: the check failed.
        StorageError: the disk is full or gone.
    """
    _check_place(out)
    plan = make_plan(run, format, dtype)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    found = None
    try:
        say("writing")
        part.mkdir(parents=True)
        plan = _write(plan, part, dtype is None, say)
        write_card(plan, part, out.name)
        said = describe(plan, part)
        write_description(said, part)
        if checked:
            say("checking with plain diffusers")
            found = check(plan, part)
            write_description(said.model_copy(update={"check": found.record()}), part)
        if out.is_dir():
            out.rmdir()
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def _write(plan: Plan, part: Path, free: bool, say: Callable[[str], None]) -> Plan:
    """Write the experts; return the plan that they are written by.

    Where the dtype is free to choose, and adapters would be lost by rounding to half precision, that is float32's.
    """
    try:
        FORMATS[plan.format].write(plan, part)
        return plan
    except UserError:
        if not free or plan.dtype == "float32":
            raise
    say(f"writing again, in float32: {plan.dtype} would round the adapters' effect away")
    shutil.rmtree(part)
    part.mkdir()
    plan = make_plan(plan.run, plan.format, "float32")
    FORMATS[plan.format].write(plan, part)
    return plan


def _check_place(out: Path) -> None:
    if not out.name or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out {out}: there is something already; name a folder that is not there yet")
