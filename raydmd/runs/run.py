"""A run's folder: what is where, and loading a finished or unfinished run from it."""

import json
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raydmd.atomic import write_text
from raydmd.config.recipe import Recipe
from raydmd.data.tiny_prompts import tiny_prompts
from raydmd.errors import UserError
from raydmd.jsonl import read_lines
from raydmd.methods.loading import load_strangers_recipe
from raydmd.methods.registry import plan_phases
from raydmd.models.adapter_files import check_adapter
from raydmd.models.base import Denoiser, Family
from raydmd.models.diffusers.hub import HUB, parse_hub_name
from raydmd.models.fingerprint import commit_of, fingerprint_teacher
from raydmd.models.registry import build_family
from raydmd.runs.expert_index import check_expert, read_index
from raydmd.runs.folders import RECIPE, expert_file, is_run, other_than, own_teacher
from raydmd.runs.student import Student
from raydmd.sampling.phase import Phase

TABLE_FILE = "prompts/encoded.json"


class Run(Student):
    """A run's folder, read.

    Raises:
        UserError: the folder or its recipe is missing.
    """

    kind = "run"
    reloads = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_run(self.folder):
            raise UserError(f"no run in '{folder}': {other_than(self.folder, [RECIPE])}")
        recipe = with_teacher(load_strangers_recipe(self.folder / RECIPE), self.folder)
        self.recipe: Recipe = with_table(with_commit(recipe, self._written_fingerprint()), self.folder)
        self.family: Family = recipe_family(self.recipe)
        self.phases: list[Phase] = plan_phases(self.recipe, self.family.schedule.t_max)

    def expert_file(self, index: int) -> Path:
        """Return where expert ``index`` (0 for the first) is kept."""
        return expert_file(self.folder, index)

    def teacher(self) -> Denoiser:
        """Load the teacher, frozen."""
        return self.family.load_teacher()

    def fingerprint(self) -> str:
        """Return the fingerprint of the teacher that the run was made with: as the run wrote it, else as it is now.

        Raises:
            UserError: the run did not write it, and the teacher is not there.
        """
        return self._written_fingerprint() or fingerprint_teacher(self.family)

    def _written_fingerprint(self) -> str:
        started = [event for event in self.events() if event.get("event") == "started" and "teacher" in event]
        return str(started[-1]["teacher"]) if started else ""

    @property
    def finished(self) -> bool:
        """Whether every phase's expert is there."""
        return all(self.expert_file(phase.index).is_file() for phase in self.phases)

    def trained_phases(self) -> list[Phase]:
        """Return the phases whose experts are there, in order.

        Raises:
            UserError: none is.
        """
        done = [phase for phase in self.phases if self.expert_file(phase.index).is_file()]
        if not done:
            raise UserError(f"run '{self.folder}' has no trained expert yet (looked for {self.expert_file(0)})")
        return done

    def files(self, index: int) -> list[Path]:
        """Return the file of expert ``index``."""
        return [self.expert_file(index)]

    def check(self) -> list[str]:
        """Return nothing: what a run cannot be sampled without is refused where it is loaded."""
        return []

    def check_content(self) -> None:
        """Hold the experts' files against the index, where the run has one.

        Raises:
            UserError: one is not the file of the index.
        """
        if (index := read_index(self.folder)) is not None:
            for phase in self.trained_phases():
                check_expert(self.folder, index, phase.index, content=True)

    def expert_state(self, index: int, finite: bool = True) -> dict[str, Tensor]:
        """Return expert ``index``'s weights by name.

        Args:
            index: of its phase, from 0.
            finite: refuse values that are not finite. False is for figures and pictures of a run that diverged.

        Raises:
            UserError: it cannot be read, has values that are not finite (if ``finite``), or its adapters are of another
                rank or alpha than the recipe's.
        """
        kind, file = self.recipe.method.experts, self.expert_file(index)
        try:
            if kind.kind == "lora":
                check_adapter(file, kind.rank, kind.alpha)
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        for name, value in state.items():
            if finite and not bool(torch.isfinite(value).all()):
                raise UserError(f"{file}: '{name}' has values that are not finite")
        return state

    def revision(self) -> str:
        """Return a name of the experts' weights: of the recipe and the index, so that copies have the same.

        Runs of before have no index: their name changes whenever their files do.

        Raises:
            UserError: a file is not the one of the index, as far as its size tells.
        """
        if (index := read_index(self.folder)) is not None:
            for phase in self.phases:
                check_expert(self.folder, index, phase.index, content=False)
            content = (self.folder / RECIPE).read_bytes() + repr(sorted(index.items())).encode()
            return blake2b(content, digest_size=6).hexdigest()
        marks = [(phase.index, (stat := self.expert_file(phase.index).stat()).st_size, stat.st_mtime_ns)
                 for phase in self.trained_phases()]  # fmt: skip
        return blake2b(repr((str(self.folder.resolve()), marks)).encode(), digest_size=6).hexdigest()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of events.jsonl."""
        return read_lines(self.folder / "events.jsonl")


def with_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with its teacher's place filled in: ``folder/teacher`` where it names none.

    With a tiny teacher come its prompts, where the recipe names none, and their embeddings stay in the folder.
    """
    if recipe.teacher.path is not None:
        return recipe
    place = own_teacher(folder)
    changes: dict[str, Any] = {"teacher": recipe.teacher.model_copy(update={"path": place})}
    if recipe.teacher.is_made:
        own = {"path": tiny_prompts(Path(place)), "cache": str(Path(place).parent / "prompts" / "encoded")}
        missing = {key: value for key, value in own.items() if getattr(recipe.prompts, key) is None}
        changes["prompts"] = recipe.prompts.model_copy(update=missing)
    return recipe.model_copy(update=changes)


def make_teacher(recipe: Recipe, folder: Path) -> None:
    """Make a run's tiny teacher in its folder, where the recipe wants one and it is not there.

    Raises:
        UserError: there is no such tiny model.
        StorageError: the disk is full or gone.
    """
    if recipe.teacher.is_made:
        from raydmd.models.tiny.teacher import make_tiny_teacher  # and with it all of diffusers' models

        make_tiny_teacher(recipe.teacher.family, recipe.teacher.tiny or "", Path(own_teacher(folder)))


def note_table(folder: Path, table: str) -> None:
    """Have a run's folder say where the table is that was made of its texts.

    Raises:
        StorageError: the disk is full or gone.
    """
    write_text(folder / TABLE_FILE, json.dumps({"table": table}) + "\n")


def with_table(recipe: Recipe, folder: Path) -> Recipe:
    """Return a run's recipe with the table that was made of its texts in ``prompts.path``, where the run has one."""
    try:
        place = str(json.loads((folder / TABLE_FILE).read_text(encoding="utf-8"))["table"])
    except (OSError, ValueError, KeyError, TypeError):
        return recipe
    update = {"path": place, "column": None}
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=update)})


def with_commit(recipe: Recipe, fingerprint: str) -> Recipe:
    """Return the recipe with a hub's teacher at the commit of a run's fingerprint; with any other as it is."""
    path, commit = recipe.teacher.path, commit_of(fingerprint)
    if path is None or not path.startswith(HUB) or commit is None:
        return recipe
    pinned = str(replace(parse_hub_name(path), revision=commit))
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": pinned})})


def recipe_family(recipe: Recipe) -> Family:
    """Build the recipe's family.

    Raises:
        UserError: an unknown family or option, or one that takes no LoRA or quantization.
    """
    family = build_family(recipe.teacher.family, recipe.teacher.path, dict(recipe.teacher.options))
    if recipe.teacher.lora is not None:
        family.use_lora(recipe.teacher.lora)
    if recipe.teacher.quantization != "none":
        family.use_quantization(recipe.teacher.quantization)
    if recipe.prompts.buckets is not None:
        family.use_buckets([bucket.size for bucket in recipe.prompts.buckets])
    return family
