"""What can be told of a recipe before a run: `raydmd distill` and `raydmd validate` refuse the same, in one wording."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from raydmd.config.buckets import KEY as BUCKETS
from raydmd.config.recipe import Recipe
from raydmd.data.embedded import EMBEDDED
from raydmd.data.pair_shards import KEY
from raydmd.data.prompt_files import COLUMN_KEY, PromptTexts
from raydmd.data.prompt_files import KEY as PROMPTS_KEY
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.locations import absolute_location
from raydmd.methods.base import Method
from raydmd.methods.pairs import check_run_pairs
from raydmd.methods.program import check_warmups
from raydmd.methods.registry import build_method, plan_phases
from raydmd.methods.teacher_quantization import check_quantization
from raydmd.models.base import Conditions, EmbeddedFamily, Family
from raydmd.models.buckets import Buckets, check_buckets
from raydmd.models.diffusers.hub import HUB, cached_snapshot, parse_hub_name
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.diffusers.sampler_grid import SCHEDULER_FILE
from raydmd.models.diffusers.teacher_folder import find_teacher
from raydmd.models.diffusers.weight_files import weight_files
from raydmd.models.embedded.prompts import ensure_embedded_prompts
from raydmd.models.encoding import encode_rows, texts_for
from raydmd.models.initial_student import check_initial
from raydmd.runs.run import make_teacher, recipe_family, with_teacher
from raydmd.sampling.limits import check_method

LOOKED_THROUGH = 64 * 2**20  # bytes of a prompt table, all of whose rows are encoded before a run; else its first


def absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with local paths made absolute, so that it means the same elsewhere."""
    method = recipe.method.absolute()
    if method.init is not None:
        method = method.model_copy(update={"init": str(Path(method.init).expanduser().resolve())})
    changes: dict[str, Any] = {"method": method}
    for name in ("teacher", "prompts"):
        section = getattr(recipe, name)
        if section.path is not None and Path(section.path).exists():
            changes[name] = section.model_copy(update={"path": str(Path(section.path).resolve())})
    if recipe.teacher.lora is not None:
        place = str(Path(recipe.teacher.lora).expanduser().resolve())
        changes["teacher"] = changes.get("teacher", recipe.teacher).model_copy(update={"lora": place})
    if isinstance(recipe.monitor.prompts, str):
        place = str(Path(recipe.monitor.prompts).expanduser().resolve())
        changes["monitor"] = recipe.monitor.model_copy(update={"prompts": place})
    if (cache := recipe.prompts.cache) is not None and "://" not in cache:
        place = str(Path(cache).expanduser().resolve())
        changes["prompts"] = changes.get("prompts", recipe.prompts).model_copy(update={"cache": place})
    if recipe.pairs.path is not None:
        place = str(Path(recipe.pairs.path).expanduser().resolve())
        changes["pairs"] = recipe.pairs.model_copy(update={"path": place})
    if recipe.plugins:
        changes["plugins"] = [str(Path(name).resolve()) if name.endswith(".py") else name for name in recipe.plugins]
    if recipe.checkpoint.path is not None:
        place = absolute_location(recipe.checkpoint.path)
        changes["checkpoint"] = recipe.checkpoint.model_copy(update={"path": place})
    return recipe.model_copy(update=changes)


@contextmanager
def with_tiny_teacher(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the recipe as it can be checked: a tiny teacher that its run makes is there, for as long.

    Raises:
        UserError: there is no such tiny model.
    """
    if not recipe.teacher.is_made:
        yield recipe
        return
    with TemporaryDirectory() as folder:
        make_teacher(recipe, Path(folder))
        yield with_teacher(recipe, Path(folder))


def check(recipe: Recipe, prompts: bool = True, hub: bool = True) -> list[str]:
    """Refuse what would fail later, before anything is written.

    Args:
        recipe: the recipe.
        prompts: whether its file of prompts is read.
        hub: whether weights that its method needs, and that are not on this machine, are fetched.

    Returns:
        What only the hub can tell, a line each.

    Raises:
        UserError: a method, a teacher or a file of prompts that is not there or does not fit.
    """
    family = recipe_family(recipe)
    check_method(recipe, family, plan_phases(recipe, family.schedule.t_max))
    check_warmups(recipe, family.schedule.t_max)
    check_quantization(recipe, family)
    if recipe.teacher.path is not None:
        family.check_teacher()
        family.teacher_times(recipe.teacher.steps, recipe.teacher.timestep_shift)
        if isinstance(family, PretrainedFamily):
            family.shape_for(*family.picture_size)  # the VAE's config and the patches go with the latents
    elif isinstance(family, EmbeddedFamily) and family.name in EMBEDDED:
        family.new_network()
    else:
        raise UserError(f"teacher.path: family '{family.name}' needs a folder or a hub's name of its weights")
    check_buckets(recipe, family, build_method(recipe).pairs)
    if recipe.method.init is not None:
        kind, count = recipe.method.experts, len(plan_phases(recipe, family.schedule.t_max))
        check_initial(
            recipe.method.init, count, family.outline(), kind.kind, kind.rank, kind.alpha, family.lora_targets
        )
    if recipe.prompts.path is None:
        if family.name not in EMBEDDED:
            raise UserError(f"prompts.path: family '{family.name}' ships no prompts; give a file of texts, or of "
                            f"embeddings in Parquet")  # fmt: skip
    elif prompts and recipe_texts(recipe, family) is not None:
        family.check_encoder(PROMPTS_KEY)
        prompts = False
    elif prompts:
        _check_table(recipe, family)
    if recipe.pairs.path is not None:
        _check_pairs(recipe, family, prompts)
    return build_method(recipe).check(family, hub)


def check_encoded(recipe: Recipe) -> None:
    """Refuse what `check` could not see of prompts while they were texts; now they are a table.

    Raises:
        UserError: embeddings that do not fit the teacher, or pairs of other prompts.
    """
    family = recipe_family(recipe)
    family.check_teacher()
    _check_table(recipe, family)
    if recipe.pairs.path is not None:
        _check_pairs(recipe, family, prompts=True)


def recipe_texts(recipe: Recipe, family: Family) -> PromptTexts | None:
    """Return the texts of ``prompts.path``; None where there is none, or it is a table.

    Raises:
        UserError: a file that is not there or cannot be used.
    """
    path, column = recipe.prompts.path, recipe.prompts.column
    texts = None if path is None else texts_for(family, path, column)
    if texts is None and column is not None:
        raise UserError(f"{COLUMN_KEY}: '{column}' is of texts, and prompts.path is no file of texts; leave it out")
    return texts


def _check_table(recipe: Recipe, family: Family) -> None:
    conditions = _encode(recipe, family)
    if recipe.teacher.path is not None:
        for sized in Buckets(recipe, family).families:
            sized.check_conditions(sized.for_size(conditions))
    if conditions and recipe.teacher.guidance_scale != 1.0 and "teacher" in build_method(recipe).roles:
        family.unconditional(conditions)


def _check_pairs(recipe: Recipe, family: Family, prompts: bool) -> None:
    """Refuse pairs that are not the recipe's; where its prompts are not read, they are not held against the pairs'."""
    with TemporaryDirectory() as folder:
        table = None
        if prompts and family.condition_columns:
            path = recipe.prompts.path or ensure_embedded_prompts(family, folder)
            table = PromptTable(path, family.condition_columns)
        check_run_pairs(recipe, family, table)


def check_offline(recipe: Recipe) -> list[str]:
    """Check a recipe by what is on this machine; return what only a network, a hub or a cluster can tell, a line each.

    Raises:
        UserError: what `check` refuses.
    """
    recipe = absolute(recipe)
    said, path, checked = [], recipe.teacher.path or "", recipe
    if path.startswith(HUB) and isinstance(family := recipe_family(recipe), PretrainedFamily):
        snapshot = cached_snapshot(parse_hub_name(path))
        if snapshot is None or not _is_whole(snapshot, family):
            said.append(f"teacher.path: '{path}' is not, or not whole, in this machine's cache")
            return [*said, *_check_without_teacher(recipe)]
        checked = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": str(snapshot)})})
    remote = _is_remote(recipe.prompts.path)
    said += check(checked, prompts=not remote, hub=False)
    return [*said, *_of_elsewhere(recipe), *notes(checked)]


def miniature_note(recipe: Recipe) -> list[str]:
    """Return the line that says of a recipe in miniature what it is; of any other none."""
    teacher = recipe.teacher
    if not teacher.is_made:
        return []
    shape = teacher.options.get("latent_shape")
    return [f"teacher.path: a random tiny '{teacher.tiny}' stands for the teacher: {recipe.iterations} iterations, "
            f"batch {recipe.batch.size}{f', latents {list(shape)}' if shape else ''}"]  # fmt: skip


def notes(recipe: Recipe) -> list[str]:
    """Return what is worth saying of a recipe that `check` accepts, a line each."""
    family, said = recipe_family(recipe), list[str]()
    if recipe.pairs.path is not None and not build_method(recipe).pairs:
        said = [f"{KEY}: method '{recipe.method.name}' takes no ODE pairs here: it is not looked at"]
    if isinstance(family, PretrainedFamily) and recipe.teacher.timestep_shift is None and family.sampler_grid is None:
        said += [f"teacher.timestep_shift: '{family.path}' has no {SCHEDULER_FILE}: the teacher's own sampler takes "
                 f"evenly spaced times"]  # fmt: skip
    if (line := family.quantization_note()) is not None:
        said.append(line)
    return [*said, *_notes_of_texts(recipe, family)]


def _notes_of_texts(recipe: Recipe, family: Family) -> list[str]:
    if _is_remote(recipe.prompts.path) or (texts := recipe_texts(recipe, family)) is None:
        return []
    said = texts.notes()
    role = recipe.runtime.of(build_method(recipe).teacher)
    if role.gpus and not recipe.runtime.encoder.gpus:
        said.append("runtime.encoder.gpus: 0: the texts are encoded by CPUs, though the teacher has a GPU")
    return said


def _check_without_teacher(recipe: Recipe) -> list[str]:
    """Check the rest of a recipe whose teacher is not here; return what is elsewhere."""
    family = recipe_family(recipe)
    unnamed = recipe_family(recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": None})}))
    check_method(recipe, unnamed, plan_phases(recipe, unnamed.schedule.t_max))
    check_warmups(recipe, unnamed.schedule.t_max)
    check_quantization(recipe, unnamed)
    if recipe.prompts.path is None:
        raise UserError(f"prompts.path: family '{family.name}' ships no prompts; give a file of texts, or of "
                        f"embeddings in Parquet")  # fmt: skip
    if not _is_remote(recipe.prompts.path) and recipe_texts(recipe, family) is None:
        _encode(recipe, family)
    method = build_method(recipe)
    own = type(method).check is not Method.check
    said = [f"method.{method.name}: its own blocks and files are not looked at without the teacher"] if own else []
    if recipe.pairs.path is not None:
        said.append(f"{KEY}: it is not held against the teacher")
    if recipe.prompts.buckets is not None:
        said.append(f"{BUCKETS}: they are not held against the teacher")
    return [*said, *_of_elsewhere(recipe)]


def _encode(recipe: Recipe, family: Family) -> Conditions:
    """Return the conditions of a small table's rows, of a large one's first."""
    table = PromptTable(str(recipe.prompts.path), family.condition_columns)
    small = sum(group.size for group in table.groups) <= LOOKED_THROUGH
    return encode_rows(family, table, np.arange(len(table) if small else 1))


def _of_elsewhere(recipe: Recipe) -> list[str]:
    said = [f"{key}: '{path}' is not looked at" for key, path in
            (("prompts.path", recipe.prompts.path), ("checkpoint.path", recipe.checkpoint.path))
            if path is not None and _is_remote(path)]  # fmt: skip
    roles = {role: recipe.runtime.of(role) for role in build_method(recipe).roles}
    said += [f"runtime.{role}: whether its resources and labels are there, the cluster tells"
             for role, settings in roles.items() if settings.resources or settings.labels]  # fmt: skip
    return said


def _is_remote(path: str | None) -> bool:
    return path is not None and "://" in path and not path.startswith("file://")


def _is_whole(snapshot: Path, family: PretrainedFamily) -> bool:
    """Whether the cache has all of a teacher's files, as far as can be told."""
    try:
        folder = find_teacher(str(snapshot), family.options["subfolder"], "subfolder" in family.given)
        return all(weight_files(network, family.options["variant"]) for network in folder.networks)
    except UserError:
        return False
