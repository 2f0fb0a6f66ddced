"""A user's texts become a table of embeddings: by the teacher's own text encoder, in an elastic pool of Ray Data.

A file of the table is a batch of texts. Which batches there are follows from the texts and the recipe alone; a worker
makes the file of one, and the driver writes it, whole or not at all. So the table is the same whoever made it, what is
there is not made again, and no storage need be shared.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from raydmd.config.recipe import Recipe
from raydmd.console import console as terminal
from raydmd.data.encoded_table import Encoded, EncodedFacts, EncodedTable, cached_place, file_content
from raydmd.data.pictures import PictureFolder
from raydmd.data.prompt_files import KEY, PromptTexts
from raydmd.errors import RunError, UserError
from raydmd.models.base import IMAGE_COLUMN
from raydmd.models.buckets import Buckets
from raydmd.models.encoding import encoded_facts, takes_pictures, texts_for
from raydmd.models.fingerprint import fingerprint_encoder
from raydmd.progress import counting
from raydmd.recipe_check import absolute, recipe_texts
from raydmd.runs.run import recipe_family, with_table
from raydmd.runtime.cluster import joined
from raydmd.runtime.membership.placement import worker_device
from raydmd.runtime.preparation import pin_commit
from raydmd.runtime.ray_data import explained, pool_results, told, wait_for_room, wait_until_gone

ROLE = "encoder"  # the section of `runtime`
NUMBER, TEXTS, PLACES, FILE, CUT = "number", "texts", "places", "file", "cut"  # columns of the job
CACHE_KEY = "prompts.cache"
TEXT_COLUMN = "prompt"  # of the table, beside the embeddings


class PromptEncoder:
    """An actor of Ray Data that has the text encoder and makes files of the table.

    Args:
        recipe: the recipe, with its teacher's place.
        facts: what the table is.
        pictures: the folder of the rows' pictures, where this machine sees it; None: they have none.
    """

    def __init__(self, recipe: Recipe, facts: EncodedFacts, pictures: str | None) -> None:
        self.facts, self.pictures = facts, None
        settings = recipe.runtime.encoder
        torch.set_num_threads(settings.threads)
        self._misfit: UserError | RunError | None = None
        try:
            self.device = worker_device(settings.role(), recipe.runtime.device)
            self.family = recipe_family(recipe)
            if fingerprint_encoder(self.family) != facts.encoder:
                raise UserError(f"teacher.path: a worker finds another text encoder than the driver in "
                                f"'{recipe.teacher.path}'")  # fmt: skip
            if pictures is not None:
                width, height = self.family.picture_size
                self.pictures = PictureFolder(pictures, (3, height, width), [], KEY)
                self.buckets = Buckets(recipe, self.family)
        except (UserError, RunError) as error:
            self._misfit = error

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode the texts of a file; return the file, how many of them were cut (-1: not known), and what is wrong."""
        number, content, cut, error = int(rows[NUMBER][0]), b"", None, self._misfit
        try:
            if error is None:
                texts, places = json.loads(rows[TEXTS][0]), json.loads(rows[PLACES][0])
                columns, cut = self._encode(number * self.facts.batch, texts, places)
                content = file_content(self.facts, number, columns, cut)
        except (UserError, RunError) as own:
            error = own
        result = {NUMBER: np.array([number]), CUT: np.array([-1 if cut is None else cut]), **told(error)}
        return {**result, FILE: np.array([content], dtype=object)}

    def _encode(self, first: int, texts: list[str], places: list[str]) -> tuple[dict[str, np.ndarray], int | None]:
        """Return the columns of the table's rows from ``first`` on, and how many texts were cut."""
        columns = dict(self.family.encode_prompts(texts, self.device))
        if self.pictures is not None:
            columns |= self._first_frames(np.arange(first, first + len(texts)))
        for name, values in columns.items():
            finite = np.isfinite(values).reshape(len(texts), -1).all(1) if values.dtype.kind == "f" else [True]
            if not np.all(finite):
                raise UserError(f"{KEY}: {places[int(np.argmin(finite))]}: its '{name}' is not finite")
        columns[TEXT_COLUMN] = np.array(texts, dtype=object)
        return columns, self.family.cut_prompts(texts)

    @torch.no_grad()
    def _first_frames(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Return the pictures' `IMAGE_COLUMN`, and that of each bucket, float32 [B, channels, f, h, w] by name."""
        assert self.pictures is not None
        sizes = self.buckets.by_column() | {IMAGE_COLUMN: self.family}
        made = dict[tuple[int, ...], np.ndarray]()  # the own size is a bucket's, too
        for family in sizes.values():
            if family.latent_shape not in made:
                width, height = family.picture_size
                pictures = self.pictures.resized((3, height, width)).take(numbers).to(self.device)
                made[family.latent_shape] = family.encode_first_frames(pictures).float().cpu().numpy()
        return {name: made[family.latent_shape] for name, family in sizes.items()}


def encode_recipe(recipe: Recipe, folder: Path, console: Console | None = None) -> Recipe:
    """Return a run's recipe with its texts' table in ``prompts.path``; with any other prompts it is as it was.

    What of the table is not in ``prompts.cache`` is encoded first, on the Ray that is there; by then the workers that
    did it are gone. With a table that is whole nothing is started and no text encoder loaded.

    Args:
        recipe: the recipe, with its teacher's place.
        folder: the run's, for what Ray says.
        console: where progress is shown; default: the terminal.

    Raises:
        UserError: texts that cannot be used or encoded, or workers that cannot be placed.
        RunError: the job broke; a disk is full or gone.
    """
    family = recipe_family(recipe)
    texts = recipe_texts(recipe, family)
    if texts is None:
        return recipe
    facts = encoded_facts(family, texts, recipe.runtime.encoder.batch)
    table = EncodedTable(cached_place(recipe.prompts.cache, facts), facts, CACHE_KEY)
    encoded = _complete(recipe, texts, table, folder, console or terminal)
    update = {"path": encoded.place, "column": None}
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=update)})


def check_same_texts(recipe: Recipe, folder: Path) -> None:
    """Refuse to continue a run with other texts, or pictures, than those that it was begun with.

    The table that was made of those says which they were; where it is gone, nothing is refused.

    Args:
        recipe: the run's recipe, with its teacher's place.
        folder: the run's.

    Raises:
        UserError: ``prompts.path`` holds others, or the teacher has another text encoder.
    """
    begun, family = with_table(recipe, folder).prompts.path, recipe_family(recipe)
    if begun is None or begun == recipe.prompts.path or (texts := recipe_texts(recipe, family)) is None:
        return
    facts = encoded_facts(family, texts, recipe.runtime.encoder.batch)
    said = EncodedTable(begun, facts, CACHE_KEY).said()
    for name, key, place, words in (
        ("texts", KEY, recipe.prompts.path, "other prompts"),
        ("encoder", "teacher.path", recipe.teacher.path, "another text encoder"),
    ):
        if said.get(name, getattr(facts, name)) != getattr(facts, name):
            raise UserError(f"{key}: '{place}' holds {words} than the run in {folder} began with; put those back, or "
                            f"choose another --out")  # fmt: skip


def encode_file(
    recipe: Recipe, prompts: str, out: str, column: str | None = None, console: Console | None = None
) -> Encoded:
    """Encode a file's texts, or a folder's captioned pictures, into a table of its own (`raydmd encode`).

    Args:
        recipe: of the teacher, the workers and the batches; its prompts do not count.
        prompts: the file or folder.
        out: folder or URI of the table; one that has a part of it is completed.
        column: of the texts; None: it is found.
        console: where progress is shown; default: the terminal.

    Raises:
        UserError: texts that cannot be used or encoded, a place that holds other things, or workers that cannot be
            placed.
        RunError: the job broke; a disk is full or gone.
    """
    remote, console = "://" in out, console or terminal
    place = out.rstrip("/") if remote else str(Path(out).resolve())
    recipe = pin_commit(absolute(recipe), "")
    family = recipe_family(recipe)
    texts = texts_for(family, prompts if "://" in prompts else str(Path(prompts).resolve()), column, "PROMPTS")
    if texts is None:
        raise UserError(f"PROMPTS '{prompts}': neither texts (.txt, .csv, .jsonl, .parquet) nor a folder of captioned "
                        f"pictures")  # fmt: skip
    family.check_encoder(f"PROMPTS '{prompts}'")
    Buckets(recipe, family)  # refuses sizes that no first frame can be of
    for note in texts.notes():
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    table = EncodedTable(place, encoded_facts(family, texts, recipe.runtime.encoder.batch), "--out")
    return _complete(recipe, texts, table, None if remote else Path(place), console)


def _complete(
    recipe: Recipe, texts: PromptTexts, table: EncodedTable, folder: Path | None, console: Console
) -> Encoded:
    """Make what is missing of a table; say what was found and made.

    Args:
        recipe: of the encoder and its workers.
        texts: of the rows.
        table: theirs.
        folder: for what Ray says; None: it is not kept.
        console: where progress is shown.
    """

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    def rows(numbers: Sequence[int]) -> int:
        return sum(end - start for start, end in map(table.span, numbers))

    table.claim()
    found = table.found()
    missing = [number for number in range(table.files) if number not in found]
    if missing:
        had = f"; {rows(list(found))} are in {table.place}" if found else ""
        say(f"encoding {rows(missing)} prompts of {texts.path} with {recipe.teacher.path}{had}")
        found |= _encode(recipe, texts, table, missing, folder, console)
    cuts = [cut for cut in found.values() if cut is not None]
    cut = sum(cuts) if cuts else None
    say(f"prompts: {rows(missing)} encoded, {len(texts) - rows(missing)} found in {table.place}")
    if cut:
        say(f"prompts: {cut} of {len(texts)} are longer than the text encoder reads, and were cut")
    return Encoded(table.place, len(texts), rows(missing), cut)


def _encode(
    recipe: Recipe, texts: PromptTexts, table: EncodedTable, missing: Sequence[int], folder: Path | None,
    console: Console,
) -> dict[int, int | None]:  # fmt: skip
    """Make files of a table; return how many texts of each were cut."""
    settings, made = recipe.runtime.encoder.role(), dict[int, int | None]()
    pictures = texts.path if takes_pictures(recipe_family(recipe)) else None
    claimed = settings.cpus * settings.max_workers + 2  # two more for Ray Data's own
    log = Path(os.devnull) if folder is None else folder / "run.log"

    def say(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    def item(number: int) -> dict[str, int | str]:
        span = range(*table.span(number))
        places = [texts.where(row) for row in span]
        return {NUMBER: number, TEXTS: json.dumps([texts.texts[row] for row in span]), PLACES: json.dumps(places)}

    with joined(claimed, recipe.runtime.object_store_mb, log) as ray_health:
        try:
            wait_for_room(settings, ROLE, recipe.runtime.placement_timeout, say)
            shown = None if console is terminal else console
            with counting("files of prompts", len(missing), shown) as done:
                work = [item(number) for number in missing]
                for result in pool_results(work, PromptEncoder, (recipe, table.facts, pictures), settings):
                    number, cut = int(result[NUMBER]), int(result[CUT])
                    table.commit(number, bytes(result[FILE]))
                    made[number] = None if cut < 0 else cut
                    done()
            wait_until_gone(PromptEncoder)
        except (UserError, RunError, KeyboardInterrupt):
            raise
        except Exception as error:  # Ray Data's are of several kinds
            file = Path("encode-error.txt") if folder is None else folder / "error.txt"
            raise ray_health.error() or explained(error, file) from None
    if lost := set(missing) - set(made):
        raise RunError(f"{table.key}: {len(lost)} files of '{table.place}' were not made")
    return made
