"""Checks an export: plain diffusers, in a process of its own, must make what the run itself makes of the same noise."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydmd.errors import RunError, UserError
from raydmd.evaluation.prompts import from_text, in_turn
from raydmd.export.formats import FORMATS
from raydmd.export.loading_code import call_arguments, pipeline_arguments
from raydmd.export.pipeline_folder import INDEX, link_part, write_pipeline
from raydmd.export.plan import HALF_DIFFERENCE, LARGEST_DIFFERENCE, Plan, make_plan
from raydmd.models.base import Conditions
from raydmd.models.diffusers.student_sampler import Inputs
from raydmd.models.diffusers.weight_files import read_json
from raydmd.runs.folders import EXPORT
from raydmd.runs.run import Run
from raydmd.sampling.noise import initial_noise
from raydmd.sampling.student import sample_student

SAMPLES, SEED = 2, 0
TEXT = "a photograph of a red fox in the snow"  # where the run has no table of prompts
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
        steps: the number of the step, from 0, in which each of them was.
        timesteps: those that the pipeline's scheduler visited.
    """

    latents: float
    largest: float
    relative: float
    levels: int | None
    calls: list[str]
    steps: list[int]
    timesteps: list[float]

    @property
    def scaled(self) -> float:
        """``latents``, by the largest where that is above 1."""
        return self.latents / max(1.0, self.largest)

    def record(self) -> dict[str, Any]:
        """Return what export.json keeps of it."""
        return {"latents": self.latents, "levels": self.levels}


def difference(run_folder: str | Path, export_folder: str | Path) -> float:
    """Return the largest difference of latents between a run's own samples and those of an export by plain diffusers.

    Where latents are above 1, it is divided by the largest.

    Args:
        run_folder: the run's.
        export_folder: of an export of it, of any format.

    Raises:
        UserError: it is no export, or the run cannot be exported so.
        RunError: plain diffusers cannot load it, or fails.
    """
    folder = Path(export_folder)
    try:
        said = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        format, dtype = str(said["format"]), str(said["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no export: {EXPORT}: {error}") from None
    return compare(make_plan(Run(run_folder), format, dtype), folder).scaled


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
        inputs = [_inputs(plan) for plan, _ in exports]
        for (plan, folder), place, (_, given) in zip(exports, scratch, inputs, strict=True):
            place.mkdir()
            _write_job(plan, folder.resolve(), place, given)
        _sample_plainly(scratch)
        return [
            _difference(plan, _own(plan, conditions), place)
            for (plan, _), place, (conditions, _) in zip(exports, scratch, inputs, strict=True)
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
    calls = [(name, step) for name, step in said["calls"] if name.startswith(plan.component)]
    return Difference(
        float(apart.abs().max()), float(ours.abs().max()), float(apart.norm() / ours.double().norm()), levels,
        [name for name, _ in calls], [step for _, step in calls], said["timesteps"],
    )  # fmt: skip


def _own(plan: Plan, conditions: Conditions) -> Tensor:
    """Return the run's own samples [SAMPLES, *latent_shape]."""
    experts = plan.run.experts(plan.family.load_teacher())
    return sample_student(plan.family, experts, plan.phases, conditions, SAMPLES, seed=SEED).latents


def _inputs(plan: Plan) -> tuple[Conditions, Inputs]:
    """Return conditions of the first prompts of the run's table, else those of a text, and the pipeline's arguments.

    Raises:
        UserError: there are none, or the pipeline does not take them as arguments.
    """
    try:
        conditions = in_turn(plan.run.recipe, plan.family, SAMPLES)
    except UserError as error:
        if not plan.family.reads_text:
            raise UserError(f"{error}; the check samples some prompts (--no-check leaves it out)") from None
        conditions = from_text(plan.run.recipe, plan.family, TEXT, SAMPLES)
    try:
        conditions, given = plan.family.pipeline_inputs(conditions)
    except UserError as error:
        raise UserError(f"{error}; the check needs it (--no-check leaves it out)") from None
    if unknown := [name for name in given if name not in pipeline_arguments(plan)]:
        raise UserError(f"prompts: column '{unknown[0]}': {plan.pipeline} takes no such argument, so that the export "
                        f"cannot be checked (--no-check leaves it out)")  # fmt: skip
    return conditions, given


def _write_job(plan: Plan, folder: Path, scratch: Path, inputs: Inputs) -> None:
    """Write what `plain_pipeline.py` reads."""
    noise = plan.family.pipeline_latents(initial_noise(plan.family, SEED, 0, SAMPLES))
    tensors, lists = {"latents": noise}, dict[str, int]()
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            lists[name] = len(value)
            tensors |= {f"{name}.{number}": each for number, each in enumerate(value)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, scratch / "given.safetensors")
    job = {
        "code": FORMATS[plan.format].code(plan), "call": call_arguments(plan), "dtype": plan.dtype, "lists": lists,
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
    write_pipeline(plan, folder, {plan.component: plan.family.network_class}, {})  # of one network: two have an index
    link_part(teacher.network, folder / plan.component, plan.family.options["variant"])
    return str(folder)
