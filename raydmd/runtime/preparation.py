"""Before a run begins: its recipe is checked, its folder made or looked into, and what another head left is fetched."""

from pathlib import Path
from typing import Any

import yaml

from raydmd.config import Recipe, dump_recipe, load_recipe, parse_recipe
from raydmd.data.embedded import EMBEDDED
from raydmd.errors import UserError
from raydmd.folders import expert_file
from raydmd.models.fingerprint import same_teacher
from raydmd.models.hub import HUB, parse_hub_name, resolve_commit
from raydmd.models.protocol import CONFIG_FILE, WEIGHTS_FILE
from raydmd.runs import with_commit
from raydmd.runtime.archivist import keep_experts
from raydmd.runtime.cluster import checkpoints
from raydmd.runtime.manifest import Archive
from raydmd.runtime.storage import Store

TEACHER = (f"teacher/{WEIGHTS_FILE}", f"teacher/{CONFIG_FILE}")  # in this order: with the last, it is whole
FREE = {"name", "runtime", "checkpoint", "monitor", "evaluation"}  # may differ when a run is continued


def pin_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the commit of a hub's teacher: that of the run in ``folder``, else the newest.

    So all workers take the same, at any time, and a run that is continued takes what it was begun with.

    Raises:
        UserError: the hub has no such model, or cannot be reached and the cache has none.
    """
    if not (recipe.teacher.path or "").startswith(HUB) or recipe.teacher.family in EMBEDDED:
        return recipe
    newest = Archive(checkpoints(recipe, folder)).peek()
    begun = with_commit(recipe, newest.teacher if newest else "")
    pinned = str(resolve_commit(parse_hub_name(begun.teacher.path or "")))
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": pinned})})


def prepare(recipe: Recipe, folder: Path, resume: str) -> int:
    """Make the run's folder, or look into the one that is there; return how many iterations are committed.

    Raises:
        UserError: the folder, or the place of the checkpoints, holds a run and ``resume`` is ``never``, or the recipe
            is another one.
    """
    kept, archive = folder / "recipe.yaml", Archive(checkpoints(recipe, folder), recipe.checkpoint.keep)
    if kept.is_file():
        if resume == "never":
            raise UserError(f"--out {folder}: it already holds a run; choose another folder, or --resume auto")
        _same_recipe(load_recipe(str(kept)), recipe, f"--out {folder}")
    elif folder.is_dir() and any(path.name not in ("teacher", "prompts") for path in folder.iterdir()):
        raise UserError(f"--out {folder}: it is not empty and holds no run; choose another folder")
    elif recipe.checkpoint.path is not None and (there := archive.read_text("recipe.yaml")) is not None:
        if resume == "never":
            raise UserError("checkpoint.path: it already holds a run; choose another place, or --resume auto")
        _same_recipe(parse_recipe(yaml.safe_load(there), "checkpoint.path"), recipe, "checkpoint.path")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "recipe.yaml.part"
    part.write_text(dump_recipe(recipe), encoding="utf-8")
    part.replace(kept)
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


def has_experts(recipe: Recipe, folder: Path, count: int) -> bool:
    """Whether a finished run's folder, which may be a new head's, has its experts; they are fetched if it lacks one.

    Raises:
        UserError: the store cannot be reached.
    """
    if all(expert_file(folder, index).is_file() for index in range(count)):
        return True
    found = Archive(checkpoints(recipe, folder)).newest()
    if found.manifest is None or found.manifest.experts < count:  # the last one is broken: the run goes on from before
        return False
    keep_experts(folder, found.manifest, found.shards)
    return True


def fetch_teacher(recipe: Recipe, folder: Path) -> None:
    """Write the teacher that the run trained itself, where its folder, which may be a new head's, lacks it.

    Raises:
        UserError: the store cannot be reached.
    """
    if recipe.checkpoint.path is None or (folder / "teacher" / CONFIG_FILE).is_file():
        return
    archive, here = Archive(recipe.checkpoint.path), Store(str(folder))
    if archive.read_bytes(f"teacher/{CONFIG_FILE}") is not None:
        for name in TEACHER:
            here.write(name, [archive.read_bytes(name) or b""])


def archive_teacher(recipe: Recipe, folder: Path) -> None:
    """Have the teacher that the run trained itself where its checkpoints are.

    Raises:
        UserError: the store cannot be reached.
    """
    if recipe.checkpoint.path is None:
        return
    archive = Archive(recipe.checkpoint.path)
    if archive.read_bytes(f"teacher/{CONFIG_FILE}") is None:
        for name in TEACHER:
            archive.write_bytes(name, (folder / name).read_bytes())


def _same_recipe(kept: Recipe, given: Recipe, where: str) -> None:
    if kept.checkpoint.path != given.checkpoint.path:
        place = kept.checkpoint.path or "its folder"
        raise UserError(f"{where}: its checkpoints are in {place}, and checkpoint.path says otherwise")
    ours, theirs = given.model_dump(mode="json"), kept.model_dump(mode="json")
    for key in ours:
        if key not in FREE and ours[key] != theirs[key]:
            name = _first_difference(ours[key], theirs[key], key)
            raise UserError(f"{where}: it holds a run of another recipe ({name}); choose another place")


def _first_difference(ours: Any, theirs: Any, key: str) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ours:
            if ours[name] != theirs.get(name):
                return _first_difference(ours[name], theirs.get(name), f"{key}.{name}")
    return f"{key}: {theirs} there, {ours} here"
