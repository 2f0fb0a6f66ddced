"""A random tiny teacher that stands for a recipe's own, so that every recipe runs in miniature on a laptop."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydmd.atomic import writing
from raydmd.data.prompts import write_prompts
from raydmd.data.tiny_prompts import PICTURES, PROMPTS, TABLE
from raydmd.errors import UserError, nearest
from raydmd.models.base import EmbeddedFamily, save_teacher
from raydmd.models.registry import FAMILIES, build_family
from raydmd.models.tiny import TINY_MODELS, TINY_VARIANTS
from raydmd.models.tiny.base import TinyModel

ROWS = 20  # of a table
FIRST_FRAMES = 6  # captioned pictures, from which videos begin
INDEX = "model_index.json"


def find_tiny(family: str, name: str | None = None) -> TinyModel | None:
    """Return a family's tiny model; None where the family's own network is the project's, and small already.

    Args:
        family: the recipe's.
        name: of a variant (``teacher.tiny``); None: the family's usual one.

    Raises:
        UserError: there is none, or it is another family's.
    """
    known = {**TINY_MODELS, **TINY_VARIANTS}
    if name in (None, family) and issubclass(FAMILIES.get(family, object), EmbeddedFamily):
        return None
    families = dict.fromkeys(model.family for model in known.values())
    if family not in families:
        raise UserError(f"teacher.path: there is no tiny model of family '{family}'{nearest(family, families)}")
    if name is not None and name not in known:
        raise UserError(f"teacher.tiny: no tiny model '{name}'{nearest(name, known)}")
    found = known[name or family]
    if found.family != family:
        raise UserError(f"teacher.tiny: '{name}' is of family '{found.family}', not of '{family}'")
    return found


def make_tiny_teacher(family: str, name: str, folder: Path) -> None:
    """Write a tiny teacher's folder with random weights, the same each time, and its prompts; one that is there stays.

    Args:
        family: the recipe's.
        name: the recipe's ``teacher.tiny``.
        folder: the teacher's; it is there whole or not at all.

    Raises:
        UserError: there is no such tiny model.
        StorageError: the disk is full or gone.
    """
    tiny = find_tiny(family, name)
    if folder.is_dir():
        return
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            if tiny is None:
                own = build_family(family)
                assert isinstance(own, EmbeddedFamily)
                save_teacher(own.new_network(), made, family, own.options)
            else:
                with _quiet():
                    _write(tiny, made)
            made.chmod(0o777 & ~_umask())
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def _write(tiny: TinyModel, folder: Path) -> None:
    """Write the network, its VAE and scheduler, its text encoders, and prompts."""
    tiny.save(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoders = tiny.encoders()
    if encoders is None:
        write_prompts(folder / TABLE, tiny.rows(ROWS))
        return
    own = json.loads((folder / INDEX).read_text()) if (folder / INDEX).is_file() else {}
    encoders.save_pretrained(folder)
    index = json.loads((folder / INDEX).read_text())
    index |= {key: value for key, value in own.items() if value != [None, None]}  # a second network and its boundary
    index["_class_name"] = tiny.build(folder).pipelines[0]  # type: ignore[attr-defined]  # of diffusers' families
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    texts = (Path(__file__).parent / PROMPTS).read_text(encoding="utf-8")
    if tiny.options.get("image_channels"):
        _write_pictures(folder / PICTURES, texts.splitlines()[:FIRST_FRAMES])
    else:
        (folder / PROMPTS).write_text(texts, encoding="utf-8")


def _write_pictures(folder: Path, captions: list[str]) -> None:
    """Write a small picture for each caption, smooth and of random colours, and their metadata.jsonl."""
    from PIL import Image

    folder.mkdir()
    draw, lines = np.random.default_rng(0), []
    for number, caption in enumerate(captions):
        corners = draw.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        name = f"{number}.png"
        Image.fromarray(corners).resize((48, 64), Image.Resampling.BILINEAR).save(folder / name)
        lines.append(json.dumps({"file_name": name, "caption": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Have diffusers and transformers say nothing of what they write."""
    import diffusers
    import transformers

    kinds: Any = [(kind.utils.logging, kind.utils.logging.get_verbosity()) for kind in (diffusers, transformers)]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        for logging, _ in kinds:
            logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield
    finally:
        for logging, level in kinds:
            logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
