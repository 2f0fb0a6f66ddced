"""export.json: what an export is, for `raydmd generate`, `raydmd serve` and whoever compares it with the run."""

import json
import os
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from raydmd import __version__
from raydmd.atomic import write_text
from raydmd.config.overrides import explain
from raydmd.config.recipe import Bucket, Experts, Section, Teacher
from raydmd.errors import UserError
from raydmd.export.formats import FORMATS
from raydmd.export.plan import Plan
from raydmd.models.diffusers.hub import HUB
from raydmd.runs.expert_index import Entry, check_entry, sha256_of
from raydmd.runs.folders import EXPORT

VERSION = 1
SCHEDULER = "scheduler/scheduler_config.json"


class File(Section):
    """A file as it was written."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ExpertPlace(Section):
    """An expert, or of one with two networks what one of them is: its times, and where it lies."""

    name: str
    times: tuple[float, ...] = Field(min_length=2, description="its step grid, falling, with its end")
    network: str = Field(description="the part of the base model's pipeline that it is, or has adapters for")
    place: str = Field(description="below the export's folder: a file, or a folder of one network or adapter")


class Description(Section):
    """An export."""

    version: Literal[1] = Field(1, description="of this file's form")
    raydmd: str = Field(description="the version that wrote it")
    run: str = Field(description="its name")
    method: str = Field(description="the run's")
    base: str = Field(description="the teacher's name, as the model card has it")
    teacher: Teacher = Field(description="the run's, with the options that the network needs here; its path is null "
                             "where the export has the networks itself")  # fmt: skip
    fingerprint: str | None = Field(description="of the teacher's weights; null: a LoRA was fused into them")
    format: Literal["diffusers", "lora", "peft", "lightning"]
    dtype: str
    experts: tuple[ExpertPlace, ...] = Field(min_length=1)
    adapter: Experts = Field(description="what the experts are: full, or lora with rank and alpha")
    buckets: tuple[Bucket, ...] | None = Field(None, description="the sizes that the run trained on; null: one")
    scheduler: dict[str, Any] | None = Field(description=f"of a pipeline's folder, what {SCHEDULER} says")
    files: dict[str, File] = Field(min_length=1, description="the experts' files")
    check: dict[str, Any] | None = Field(None, description="how far plain diffusers' samples are from the run's")

    @property
    def times(self) -> list[float]:
        """All times, falling to 0."""
        return [self.experts[0].times[0], *(t for expert in self.experts for t in expert.times[1:])]

    @property
    def own_networks(self) -> bool:
        """Whether each expert is a network of the folder."""
        return self.adapter.kind == "full"

    @property
    def needs_base(self) -> bool:
        """Whether the networks are elsewhere: the experts are adapters of the base model."""
        return self.format != "diffusers"

    def text(self) -> str:
        """Return what export.json has."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    def without_path(self) -> "Description":
        """Return the same without a base model's path on this machine, for other machines."""
        path = self.teacher.path
        if path is None or path.startswith(HUB):
            return self
        return self.model_copy(update={"teacher": self.teacher.model_copy(update={"path": None})})

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        for expert, other in pairwise(self.experts):
            if expert.times[-1] != other.times[0]:
                raise ValueError(f"experts: {expert.name} ends at {expert.times[-1]:g}, and {other.name} begins at "
                                 f"{other.times[0]:g}")  # fmt: skip
        if any(not after < before for before, after in pairwise(self.times)) or self.times[-1] != 0.0:
            raise ValueError(f"experts: their times do not fall to 0: {self.times}")
        for name in (*self.files, *(expert.place for expert in self.experts)):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: '{name}' is not a path below the export's folder")
        for expert in self.experts:
            if not self.files_of(expert):
                raise ValueError(f"files: none is of {expert.name}, at '{expert.place}'")
        if self.needs_base and self.own_networks:
            raise ValueError(f"adapter.kind: full experts are of format diffusers, not {self.format}")
        return self

    def files_of(self, expert: ExpertPlace) -> list[str]:
        """Return the names of an expert's files, its safetensors first."""
        names = [name for name in self.files if name == expert.place or name.startswith(f"{expert.place}/")]
        return sorted(names, key=lambda name: (not name.endswith(".safetensors"), name))

    def check_files(self, folder: Path, content: bool) -> None:
        """Refuse files that are not as they were written.

        Args:
            folder: the export's.
            content: compare the hashes, too.

        Raises:
            UserError: one is missing, cut short or another.
        """
        for name, file in self.files.items():
            check_entry(folder / name, Entry(file.bytes, file.sha256), EXPORT, content)


def describe(plan: Plan, folder: Path) -> Description:
    """Return what is said of an export whose weights are in ``folder``."""
    method, teacher = plan.run.recipe.method, plan.run.recipe.teacher
    options = {key: value for key, value in plan.run.family.given.items() if key != "gradient_checkpointing"}
    path: str | None = None
    if plan.format == "diffusers":  # the folder has the parts under their own names
        options = {key: value for key, value in options.items() if key not in ("subfolder", "variant")}
        options["dtype"] = plan.dtype
    else:
        path = str(teacher.path)
        path = path if path.startswith(HUB) else os.path.abspath(path)
    adapters = plan.is_lora if plan.format != "diffusers" else plan.keeps_adapters
    places = FORMATS[plan.format].places(plan)
    ends = [*(segment.times[0] for segment in plan.segments[1:]), plan.times[-1]]
    return Description(
        raydmd=__version__, run=plan.run.name, method=method.name, base=plan.base,
        teacher=teacher.model_copy(update={"path": path, "options": options, "lora": None}),
        fingerprint=plan.run.fingerprint() if teacher.lora is None else None,
        format=plan.format, dtype=plan.dtype,
        experts=tuple(
            ExpertPlace(name=segment.name, times=(*segment.times, end), network=segment.component, place=place)
            for segment, end, place in zip(plan.segments, ends, places, strict=True)
        ),
        adapter=method.experts if adapters else Experts(kind="full"), buckets=plan.run.recipe.prompts.buckets,
        scheduler=scheduler_of(folder) if plan.format == "diffusers" else None,
        files={name: _entry(folder / name) for place in places for name in _names(folder, place)},
    )  # fmt: skip


def write_description(said: Description, folder: Path) -> None:
    """Write export.json.

    Raises:
        StorageError: the disk is full or gone.
    """
    write_text(folder / EXPORT, said.text())


def read_description(folder: Path) -> Description:
    """Read export.json.

    Raises:
        UserError: it cannot be read, is of another version, or says what cannot be.
    """
    file = folder / EXPORT
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable: {' '.join(str(error).split())[:200]}") from None
    version = tree.get("version", 0) if isinstance(tree, dict) else None
    if type(version) is not int:
        raise UserError(f"{file} is not what `raydmd export` writes")
    if version != VERSION:
        what = "install a newer raydmd" if version > VERSION else "export the run again"
        raise UserError(f"{file} is of version {version}, and this raydmd reads {VERSION}: {what}")
    try:
        return Description.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, Description)}") from None


def scheduler_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a pipeline's scheduler, its class with them.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        said = json.loads((folder / SCHEDULER).read_text(encoding="utf-8"))
        return {key: value for key, value in said.items() if key == "_class_name" or not key.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / SCHEDULER} is not readable: {' '.join(str(error).split())[:200]}") from None


def check_scheduler(said: Description, folder: Path) -> None:
    """Refuse a pipeline's folder whose scheduler is no longer that of the trained times.

    Raises:
        UserError: a setting of it differs.
    """
    if said.scheduler is None:
        return
    found = scheduler_of(folder)
    for key, wanted in said.scheduler.items():  # a newer diffusers may have further ones
        if key not in found or found[key] != wanted:
            there = f"{key} {found[key]!r}" if key in found else f"no {key}"
            raise UserError(f"{folder / SCHEDULER} has {there}, and {EXPORT} {wanted!r}: it is another grid than the "
                            f"experts' times {', '.join(f'{t:.4g}' for t in said.times[:-1])}")  # fmt: skip


def _names(folder: Path, place: str) -> list[str]:
    """Return the files of an expert's place by their paths below the folder."""
    if (folder / place).is_file():
        return [place]
    return sorted(file.relative_to(folder).as_posix() for file in (folder / place).rglob("*") if file.is_file())


def _entry(file: Path) -> File:
    return File(bytes=file.stat().st_size, sha256=sha256_of(file))
