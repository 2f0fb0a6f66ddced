"""Checks an export: plain diffusers, in a process of its own, must make what the run itself makes of the same noise."""

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydmd.errors import RunError, UserError
from raydmd.evaluation.prompts import from_text, in_turn
from raydmd.export.formats import FORMATS
from raydmd.export.loading_code import call_arguments
from raydmd.export.pipeline_folder import INDEX, link_part, write_pipeline
from raydmd.export.plan import HALF_DIFFERENCE, LARGEST_DIFFERENCE, Plan, make_plan
from raydmd.models.base import Conditions
from raydmd.models.diffusers.prompts_by_pipeline import NEGATIVE
from raydmd.models.diffusers.weight_files import read_json
from raydmd.runs.run import Run
from raydmd.sampling.noise import initial_noise
from raydmd.sampling.student import sample_student

SAMPLES, SEED = 2, 0
TEXT = "a photograph of a red fox in the snow"  # where the run has no table of prompts
RECORD = "export.json"
SCRIPT = Path(__file__).with_name("plain_pipeline.py")


@dataclass(frozen=True)
class Difference:
    """How an export's samples differ from the run's.

    Attributes:
        latents: largest absolute difference.
        largest: absolute value of the run's latents.
        relative: norm of the difference by the norm of the latents.
        levels: largest difference of decoded pixels in levels of 255; None: there is no VAE to decode with.
        calls: the pipeline's part that made each call of a network, in order, the text encoder and VAE left out.
        timesteps: those that the pipeline's scheduler visited.
    """

    latents: float
    largest: float
    relative: float
    levels: int | None
    calls: list[str]
    timesteps: list[float]

    def record(self) -> dict[str, Any]:
        """Return what export.json keeps of it."""
        return {"latents": self.latents, "levels": self.levels}


def difference(run_folder: str | Path, export_folder: str | Path) -> float:
    """Return the largest difference of latents between a run's own samples and those of an export by plain diffusers.

    Args:
        run_folder: the run's.
        export_folder: of an export of it, of any format.

    Raises:
        UserError: it is no export, or the run cannot be exported so.
        RunError: plain diffusers cannot load it, or fails.
    """
    folder = Path(export_folder)
    try:
        said = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        format, dtype = str(said["format"]), str(said["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no export: {RECORD}: {error}") from None
    return compare(make_plan(Run(run_folder), format, dtype), folder).latents


def check(plan: Plan, folder: Path) -> Difference:
    """Refuse an export whose samples are not the run's.

    Raises:
        RunError: they differ, or plain diffusers cannot load it.
        UserError: there is no prompt to compare with.
    """
    found = compare(plan, folder)
    if plan.dtype == "float32":
        limit = LARGEST_DIFFERENCE * max(1.0, found.largest)
        wrong = found.latents > limit or (found.levels or 0) > 1
        words = f"latents by {found.latents:.2g} (limit {limit:.2g}), pixels by {found.levels} levels"
    else:
        wrong = found.relative > HALF_DIFFERENCE
        words = f"latents by {found.relative:.2g} of their norm (limit {HALF_DIFFERENCE:g})"
    if wrong or found.latents != found.latents:
        raise RunError(f"--format {plan.format}: plain diffusers samples the export otherwise than the run: {words}; "
                       f"nothing was written")  # fmt: skip
    return found


def compare(plan: Plan, folder: Path) -> Difference:
    """Sample the run here and the export there, from the same noise and prompts, and compare.

    Raises:
        RunError: plain diffusers cannot load the export, or fails.
        UserError: there is no prompt to compare with.
    """
    return compare_all([(plan, folder)])[0]


def compare_all(exports: Sequence[tuple[Plan, Path]]) -> list[Difference]:
    """Compare several exports, each as `compare` does, in one process: loading diffusers is most of the time.

    Raises:
        RunError: plain diffusers cannot load one, or fails.
        UserError: there is no prompt to compare with.
    """
    with tempfile.TemporaryDirectory(prefix="raydmd-export-") as root:
        scratch = [Path(root) / str(number) for number in range(len(exports))]
        conditions = [_conditions(plan) for plan, _ in exports]
        for (plan, folder), place, given in zip(exports, scratch, conditions, strict=True):
            place.mkdir()
            _write_job(plan, folder.resolve(), place, given)
        _sample_plainly(scratch)
        return [
            _difference(plan, _own(plan, given), place)
            for (plan, _), place, given in zip(exports, scratch, conditions, strict=True)
        ]


def _difference(plan: Plan, latents: Tensor, scratch: Path) -> Difference:
    """Compare the run's own latents with what plain diffusers has written."""
    made, said = load_file(scratch / "made.safetensors"), json.loads((scratch / "made.json").read_text("utf-8"))
    ours, levels = plan.family.stepped_latents(latents), None
    apart = (made["latents"] - ours).double()
    if "pixels" in made:
        pixels = made["pixels"] if made["pixels"].ndim == 5 else made["pixels"][:, None]
        frames = plan.family.decode_video(latents).float().permute(0, 1, 3, 4, 2)
        levels = int((torch.round(255 * pixels) - torch.round(255 * frames)).abs().max())
    calls = [name for name in said["calls"] if name.startswith(plan.component)]
    relative = float(apart.norm() / ours.double().norm())
    return Difference(float(apart.abs().max()), float(ours.abs().max()), relative, levels, calls, said["timesteps"])


def _own(plan: Plan, conditions: Conditions) -> Tensor:
    """Return the run's own samples [SAMPLES, *latent_shape]."""
    experts = plan.run.experts(plan.family.load_teacher())
    return sample_student(plan.family, experts, plan.phases, conditions, SAMPLES, seed=SEED).latents


def _conditions(plan: Plan) -> Conditions:
    """Return the first prompts of the run's table, else those of a text.

    Raises:
        UserError: there are none.
    """
    try:
        return in_turn(plan.run.recipe, plan.family, SAMPLES)
    except UserError as error:
        if not plan.family.reads_text:
            raise UserError(f"{error}; the check samples some prompts (--no-check leaves it out)") from None
        return from_text(plan.run.recipe, plan.family, TEXT, SAMPLES)


def _write_job(plan: Plan, folder: Path, scratch: Path, conditions: Conditions) -> None:
    """Write what `plain_pipeline.py` reads.

    Raises:
        UserError: the network needs what the pipeline does not take as an argument.
    """
    import diffusers

    taken = inspect.signature(getattr(diffusers, plan.pipeline).__call__).parameters
    noise = plan.family.pipeline_latents(initial_noise(plan.family, SEED, 0, SAMPLES))
    given: Mapping[str, Tensor] = {
        "latents": noise, **{k: v for k, v in conditions.items() if k in taken and not k.startswith(NEGATIVE)}
    }  # fmt: skip
    if left := [name for name in conditions if name not in given and not name.startswith(NEGATIVE)]:
        raise UserError(f"prompts: column '{left[0]}': {plan.pipeline} takes no such argument, so that the export "
                        f"cannot be checked (--no-check leaves it out)")  # fmt: skip
    save_file({name: value.contiguous() for name, value in given.items()}, scratch / "given.safetensors")
    job = {
        "code": FORMATS[plan.format].code(plan), "call": call_arguments(plan), "dtype": plan.dtype,
        "folder": str(folder), "base": _base(plan, scratch / "base"),
    }  # fmt: skip
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")


def _sample_plainly(scratch: Sequence[Path]) -> None:
    """Run `plain_pipeline.py` in a process of its own.

    Raises:
        RunError: it fails.
    """
    script = [sys.executable, "-P", str(SCRIPT), *map(str, scratch)]
    done = subprocess.run(script, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise RunError(f"plain diffusers cannot sample the export: {lines[-1][:300]}")


def _base(plan: Plan, folder: Path) -> str:
    """Return the teacher's pipeline for adapters: its own folder, or one around it where that has no model_index."""
    teacher = plan.family.teacher_folder()
    teacher.fetch_weights(plan.family.options["variant"])
    if plan.format == "diffusers":
        return ""  # the folder has all of it
    if (teacher.root / INDEX).is_file():
        networks = (plan.component, plan.family.second_network)
        parts = [name for name, kind in read_json(teacher.root / INDEX).items() if isinstance(kind, list)]
        teacher.fetch([f"{part}/*" for part in parts if part not in networks])
        return str(teacher.root.resolve())
    write_pipeline(plan, folder, {plan.component: plan.family.network_class}, {})
    link_part(teacher.network, folder / plan.component, plan.family.options["variant"])
    return str(folder)
