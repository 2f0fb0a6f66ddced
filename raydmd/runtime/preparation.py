"""Before a run begins: its recipe is checked, its folder made or looked into, and what another head left is fetched."""

from collections.abc import Callable
from pathlib import Path

import yaml

from raydmd.atomic import remove_parts, write_text, writing
from raydmd.config.recipe import Recipe, dump_recipe
from raydmd.data.embedded import EMBEDDED
from raydmd.errors import UserError
from raydmd.jsonl import read_lines
from raydmd.locations import KEY
from raydmd.methods.loading import parse_recipe
from raydmd.methods.program import trace_method
from raydmd.models.base import CONFIG_FILE, WEIGHTS_FILE
from raydmd.models.diffusers.hub import HUB, parse_hub_name, resolve_commit
from raydmd.models.fingerprint import same_teacher
from raydmd.runs.folders import expert_file
from raydmd.runs.run import with_commit
from raydmd.runtime.checkpoint.lock import LOCK
from raydmd.runtime.checkpoint.manager import Archive, Writer
from raydmd.runtime.checkpoint.plan import run_plan
from raydmd.runtime.checkpoint.storage import Store
from raydmd.runtime.checkpoint.writer import keep_experts, spoilt_experts
from raydmd.runtime.cluster import checkpoints
from raydmd.runtime.resume_rules import check_same_run

Say = Callable[[str], None]
TEACHER = (f"teacher/{WEIGHTS_FILE}", f"teacher/{CONFIG_FILE}")  # in this order: with the last, it is whole


def pin_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the commit of a hub's teacher: that of the run in ``folder``, else the newest.

    So all workers take the same, at any time, and a run that is continued takes what it was begun with.

    Raises:
        UserError: the hub has no such model, or cannot be reached and the cache has none.
    """
    if not _is_of_a_hub(recipe):
        return recipe
    newest = Archive(checkpoints(recipe, folder)).peek()
    return pin_commit(recipe, newest.teacher if newest else "")


def pin_commit(recipe: Recipe, fingerprint: str) -> Recipe:
    """Return the recipe with the commit of a hub's teacher: that of a fingerprint which names one, else the newest.

    Raises:
        UserError: the hub has no such model, or cannot be reached and the cache has none.
    """
    if not _is_of_a_hub(recipe):
        return recipe
    begun = with_commit(recipe, fingerprint)
    pinned = str(resolve_commit(parse_hub_name(begun.teacher.path or "")))
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": pinned})})


def _is_of_a_hub(recipe: Recipe) -> bool:
    return (recipe.teacher.path or "").startswith(HUB) and recipe.teacher.family not in EMBEDDED


def prepare(recipe: Recipe, folder: Path, resume: str, owner: str = "", say: Say = lambda words: None) -> int:
    """Make the run's folder, or look into the one that is there; return how many iterations are committed.

    What a start that failed has left is no run: it stands in nobody's way.

    Args:
        recipe: the run's recipe.
        folder: its folder.
        resume: as `raydmd.runtime.launch.distill` takes it.
        owner: the token under which the driver holds the folder and the place of the checkpoints.
        say: told from where a run that was given another length goes on.

    Raises:
        UserError: the folder, or the place of the checkpoints, holds a run and ``resume`` is ``never``, or the recipe
            is another one.
        StorageError: a disk is full or gone.
    """
    kept, archive = folder / "recipe.yaml", _archive(recipe, folder, owner)
    _remove_parts(folder)
    if kept.is_file():
        if resume == "never" and not _is_blank(folder, archive):
            raise UserError(f"--out {folder}: it already holds a run; choose another folder, or --resume auto")
        _compare(kept.read_text(encoding="utf-8"), recipe, f"--out {folder}", folder, _is_blank(folder, archive), say)
    elif folder.is_dir() and any(not _is_ours(path) for path in folder.iterdir()):
        raise UserError(f"--out {folder}: it is not empty and holds no run; choose another folder")
    elif recipe.checkpoint.path is not None and (there := archive.read_text("recipe.yaml")) is not None:
        if resume == "never" and not _is_blank(folder, archive):
            raise UserError("checkpoint.path: it already holds a run; choose another place, or --resume auto")
        _compare(there, recipe, KEY, folder, _is_blank(folder, archive), say)
    write_text(kept, dump_recipe(recipe))
    if recipe.checkpoint.path is not None:
        archive.write_text("recipe.yaml", dump_recipe(recipe))
    newest = archive.peek()
    return newest.iteration if newest else 0


def check_fingerprint(recipe: Recipe, folder: Path, fingerprint: str) -> None:
    """Refuse to continue a run with another teacher than the one that it was begun with.

    Args:
        recipe: the run's recipe, with its teacher's place.
        folder: the run's folder.
        fingerprint: of the teacher that is there now.

    Raises:
        UserError: another one was there when the run's newest manifest was written.
    """
    newest = Archive(checkpoints(recipe, folder)).peek()
    if newest is not None and newest.teacher and not same_teacher(newest.teacher, fingerprint):
        raise UserError(f"teacher.path: '{recipe.teacher.path}' holds another teacher than the run in {folder} began "
                        f"with (fingerprint {fingerprint}, not {newest.teacher}); put that one back, or choose "
                        f"another --out")  # fmt: skip


def check_initial_student(recipe: Recipe, folder: Path, fingerprint: str) -> None:
    """Refuse to continue a run with another ``method.init`` than the one that it was begun with.

    Args:
        recipe: the run's recipe.
        folder: the run's folder.
        fingerprint: of what is there now; "" where the recipe names none.

    Raises:
        UserError: another one was there when the run's newest manifest was written.
    """
    newest = Archive(checkpoints(recipe, folder)).peek()
    if newest is not None and newest.initial and newest.initial != fingerprint:
        raise UserError(f"method.init: '{recipe.method.init}' holds another student than the run in {folder} began "
                        f"with (fingerprint {fingerprint}, not {newest.initial}); put that one back, or choose "
                        f"another --out")  # fmt: skip


def has_experts(recipe: Recipe, folder: Path, count: int, say: Say = lambda words: None, owner: str = "") -> bool:
    """Whether a finished run's folder, which may be a new head's, has its experts, to the bit.

    Those that it lacks, or that differ from what the run's last manifest says, are fetched from the archive.

    Args:
        recipe: the run's recipe.
        folder: its folder.
        count: how many experts a finished run has.
        say: told what was broken and is restored.
        owner: the token under which the driver holds the archive.

    Raises:
        UserError: the store cannot be reached.
        StorageError: the run's disk is full or gone.
    """
    archive = _archive(recipe, folder, owner)
    newest = archive.peek()
    if newest is None or newest.experts < count:
        return False
    if not (spoilt := spoilt_experts(folder, newest)):
        return True
    found = archive.newest()
    for words in found.skipped:
        say(words)
    if found.manifest is None or found.manifest.experts < count:  # the last one is broken: the run goes on from before
        return False
    for index in spoilt:
        if (path := expert_file(folder, index)).exists():
            say(f"{path} is not what the run wrote: it is restored from {archive.store}")
    keep_experts(folder, found.manifest, found.shards)
    return True


def fetch_teacher(recipe: Recipe, folder: Path) -> None:
    """Write the teacher that the run trained itself, where its folder, which may be a new head's, lacks it.

    Raises:
        UserError: the store cannot be reached.
        StorageError: the run's disk is full or gone.
    """
    if recipe.checkpoint.path is None or (folder / "teacher" / CONFIG_FILE).is_file():
        return
    archive, here = Archive(recipe.checkpoint.path), Store(str(folder))
    if archive.read_bytes(f"teacher/{CONFIG_FILE}") is not None:
        for name in TEACHER:
            with writing(folder / name):
                here.write(name, [archive.read_bytes(name) or b""])


def archive_teacher(recipe: Recipe, folder: Path, owner: str = "") -> None:
    """Have the teacher that the run trained itself where its checkpoints are.

    Raises:
        UserError: the store cannot be reached.
        StorageError: its disk is full or gone.
    """
    if recipe.checkpoint.path is None:
        return
    archive = _archive(recipe, folder, owner)
    if archive.read_bytes(f"teacher/{CONFIG_FILE}") is None:
        for name in TEACHER:
            archive.write_bytes(name, (folder / name).read_bytes())


def _archive(recipe: Recipe, folder: Path, owner: str) -> Archive:
    writer, plan = Writer(owner) if owner else None, run_plan(recipe, trace_method(recipe))
    return Archive(checkpoints(recipe, folder), recipe.checkpoint.keep, writer, folder, plan)


def _is_ours(path: Path) -> bool:
    """Whether a driver may have left this before the folder had its recipe."""
    if path.name == "checkpoints":
        return path.is_dir() and all(_is_ours(below) for below in path.iterdir())
    return path.name in ("teacher", "prompts", LOCK) or path.name.endswith(".part")


def _is_blank(folder: Path, archive: Archive) -> bool:
    """Whether a folder, and the place of its checkpoints, hold nothing that was trained: the first start failed."""
    made = ("experts", "teacher", "samples", "evaluation.json")
    if any((folder / name).exists() for name in made) or read_lines(folder / "metrics.jsonl"):
        return False
    files, folders = archive.store.listing()
    return not folders and all(name in ("recipe.yaml", LOCK) or name.endswith(".part") for name in files)


def _remove_parts(folder: Path) -> None:
    """Remove what a driver that was killed has left half-written."""
    places = [folder, *(folder / name for name in ("samples", "teacher", "prompts", ".cache"))]
    for place in (*places, *(folder / "experts").glob("phase-*")):
        remove_parts(place)


def _compare(kept: str, recipe: Recipe, where: str, folder: Path, blank: bool, say: Say) -> None:
    """Refuse a recipe that is not the one that a run was begun with; one with which nothing was made counts not.

    Raises:
        UserError: it is another one, or the run's cannot be read.
    """
    if not kept.strip():  # a disk that was full, or a power cut
        if not blank:
            raise UserError(f"{where}: its recipe.yaml is empty; put it back, or choose another place")
        return
    try:
        tree = yaml.safe_load(kept)
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        if not blank:
            raise UserError(f"{where}: its recipe.yaml cannot be read; put it back, or choose another place")
        return
    if blank and tree.get("checkpoint", {}).get("path") == recipe.checkpoint.path:
        return
    before = parse_recipe(tree, where)
    check_same_run(before, recipe, where, lambda: _committed(before, folder))
    if before.iterations == recipe.iterations or not (done := _committed(before, folder)):
        return
    change = f"iterations: {before.iterations} there, {recipe.iterations} here"
    if not (first := _committed(recipe, folder)):
        raise UserError(f"{where}: {change}: none of its manifests is of before the end of its phase "
                        f"(checkpoint.keep: {before.checkpoint.keep}); choose another place")  # fmt: skip
    if first != done:
        say(f"{change}: the run goes on from iteration {first}, its last manifest of before the end of its phase")


def _committed(recipe: Recipe, folder: Path) -> int:
    """Return the iterations of the newest manifest that is of a recipe's plan."""
    newest = _archive(recipe, folder, "").peek()
    return newest.iteration if newest else 0
