"""ODE pairs in a folder: one record of what they are, and shards that are whole or not there. Shared by runs.

    pairs.json                   what determines every bit, how many pairs there are, how they are cut
    pairs-000000.safetensors     noise, result and conditions/NAME of the first pairs, and a checksum of each pair

The folder is a path; where several machines use it, it is on storage that all of them share.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from raydmd.atomic import replacing, write_text
from raydmd.data.conditions import Conditions
from raydmd.data.trajectories import PAIR_CHUNK, Pairs
from raydmd.errors import UserError, nearest

FORMAT = "raydmd-pairs-1"
INDEX_FILE = "pairs.json"
KEY = "pairs.path"  # the recipe's key, which messages name
CONDITIONS = "conditions/"  # before a condition's name in a shard
RECIPE_KEYS = {
    "family": "teacher.family", "teacher": "teacher.path", "guidance_scale": "teacher.guidance_scale",
    "guidance_rescale": "teacher.guidance_rescale",
    "steps": "teacher.steps", "times": "teacher.timestep_shift", "dtype": "teacher.options.dtype",
    "latent_shape": "teacher.options.latent_shape", "seed": "seed", "prompts": "prompts.path",
    "inputs": "teacher.options",
}  # fmt: skip


@dataclass(frozen=True)
class PairFacts:
    """All that determines pair k, besides the kind of hardware that computes it.

    Attributes:
        family: the teacher's.
        teacher: its fingerprint (`raydmd.models.fingerprint`); a hub's commit in it is not compared.
        guidance_scale: w in u + w (c - u).
        guidance_rescale: none, or norm (`raydmd.objectives.guidance`).
        steps: of its own sampler.
        times: that sampler's falling times.
        dtype: in which the network computes.
        latent_shape: of a sample.
        seed: of the noise and of the prompts' order.
        prompts: the identity of the rows (`PromptTable.identity`); None: not known here, and not compared.
        inputs: what else the network is told at every call (`Family.constant_inputs`), as text.
    """

    family: str
    teacher: str
    guidance_scale: float
    guidance_rescale: str
    steps: int
    times: tuple[float, ...]
    dtype: str
    latent_shape: tuple[int, ...]
    seed: int
    prompts: str | None
    inputs: str = ""

    def difference(self, there: "PairFacts") -> str | None:
        """Return what differs first from the facts of a folder, by the recipe's key; None: nothing does."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(there, field.name)
            if field.name == "teacher":
                ours, theirs = ours.partition("@")[0], theirs.partition("@")[0]
            if ours == theirs or (field.name == "prompts" and ours is None):
                continue
            key = RECIPE_KEYS[field.name]
            if field.name == "times":
                return f"{key}: other times of the teacher's sampler"
            if field.name == "prompts":
                return f"{key}: other prompts"
            what = "another teacher, of fingerprint " if field.name == "teacher" else ""
            return f"{key}: {what}{_shown(theirs)} there, {_shown(ours)} here"
        return None


@dataclass(frozen=True)
class PairIndex:
    """What ``pairs.json`` says.

    Attributes:
        facts: what the pairs are.
        total: how many.
        shard_size: pairs of a shard; the last one may have fewer.
        chunk: pairs that are computed at once.

    Raises:
        ValueError: no pairs, or a shard that is not whole chunks.
    """

    facts: PairFacts
    total: int
    shard_size: int = PAIR_CHUNK
    chunk: int = PAIR_CHUNK

    def __post_init__(self) -> None:
        if self.total < 1 or self.chunk < 1 or self.shard_size < 1 or self.shard_size % self.chunk:
            raise ValueError(f"a shard is whole chunks of {self.chunk} pairs, not {self.shard_size} of {self.total}")

    @property
    def shards(self) -> int:
        """How many shards there are when all are."""
        return -(-self.total // self.shard_size)

    def span(self, number: int) -> tuple[int, int]:
        """Return the first pair of a shard, and how many it has."""
        start = number * self.shard_size
        return start, min(self.shard_size, self.total - start)

    def text(self) -> str:
        """Return the content of ``pairs.json``."""
        tree = {"format": FORMAT, **asdict(self.facts)}
        if not tree["inputs"]:
            del tree["inputs"]
        tree |= {"total": self.total, "shard_size": self.shard_size, "chunk": self.chunk}
        return json.dumps(tree, indent=2) + "\n"

    def digest(self) -> str:
        """Return a short name of it, which every shard carries."""
        return blake2b(self.text().encode(), digest_size=16).hexdigest()


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"pairs-{number:06d}.safetensors"


def read_index(folder: Path) -> PairIndex | None:
    """Return what a folder's ``pairs.json`` says; None where there is no such file.

    Raises:
        UserError: it cannot be read, or is of another format.
    """
    file = folder / INDEX_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            raise ValueError("another format")
        cut = {name: int(tree.pop(name)) for name in ("total", "shard_size", "chunk")}
        tree["times"], tree["latent_shape"] = tuple(map(float, tree["times"])), tuple(map(int, tree["latent_shape"]))
        return PairIndex(PairFacts(**tree), **cut)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{file} is not readable: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no record of ODE pairs in the format {FORMAT}") from error


def claim_index(folder: Path, index: PairIndex, key: str = "--out") -> PairIndex:
    """Have a folder's ``pairs.json`` say what its shards are, before the first is written; return what it says.

    Args:
        folder: theirs; made if it is not there.
        index: what it is to say.
        key: the option that names the folder, for errors.

    Raises:
        UserError: the folder holds pairs of another recipe, another number of them, or other things.
        StorageError: the disk is full or gone.
    """
    refuse_other_things(folder, key)
    there = read_index(folder)
    if there is None:
        write_text(folder / INDEX_FILE, index.text())
        return index
    difference = index.facts.difference(there.facts)
    for name in ("total", "shard_size", "chunk"):
        ours, theirs = getattr(index, name), getattr(there, name)
        if difference is None and ours != theirs:
            difference = f"{name}: {theirs} there, {ours} here"
    if difference is not None:
        raise UserError(f"{key} {folder}: it holds pairs of another recipe ({difference}); choose another folder")
    return there


def refuse_other_things(folder: Path, key: str = "--out") -> None:
    """Refuse a folder that holds other things than pairs.

    Raises:
        UserError: it does.
    """
    if folder.is_dir() and not (folder / INDEX_FILE).is_file() and not all(map(_is_ours, folder.iterdir())):
        raise UserError(f"{key} {folder}: it is not empty and holds no pairs; choose another folder")


def write_shard(folder: Path, index: PairIndex, number: int, pairs: Pairs) -> str:
    """Write a shard, whole or not at all; return its file's name.

    Raises:
        ValueError: not as many pairs as the shard has.
        StorageError: the disk is full or gone.
    """
    start, count = index.span(number)
    if len(pairs) != count:
        raise ValueError(f"shard {number} has {count} pairs, not {len(pairs)}")
    tensors = _named(pairs.noise, pairs.result, pairs.conditions)
    metadata = {"pairs": index.digest(), "first": str(start), "checksums": ",".join(_checksums(tensors))}
    name = shard_name(number)
    with replacing(folder / name) as part:
        part.write_bytes(save(tensors, metadata))
    return name


def missing_shards(folder: Path, index: PairIndex, thorough: bool = False) -> list[int]:
    """Return the numbers of the shards that are not there, or not whole.

    Args:
        folder: theirs.
        index: what its ``pairs.json`` says.
        thorough: read every pair and hold it against its checksum; else the files' headers and sizes tell.
    """
    missing = []
    for number in range(index.shards):
        shard = _open(folder, index, number)
        if shard is None or (thorough and shard.broken(np.arange(index.span(number)[1]), shard.tensors)):
            missing.append(number)
    return missing


def check_pairs(path: str, facts: PairFacts, count: int) -> PairIndex:
    """Refuse a folder of pairs that is not what a run with these facts would make itself.

    Args:
        path: the folder.
        facts: of the run's recipe.
        count: how many pairs the run's method needs.

    Raises:
        UserError: ``pairs.path: ...``: the folder is not there or not complete; its pairs are others, or too few; or
            the first ``count`` of them end inside a chunk, which the run would compute otherwise.
    """
    folder, make = Path(path), f"`raydmd pairs RECIPE --out {shlex.quote(path)}`"
    if not folder.is_dir():
        raise _no_folder(folder, make)
    index = read_index(folder)
    if index is None:
        raise UserError(f"{KEY}: '{path}' holds no pairs: it has no {INDEX_FILE}; {make} makes them")
    difference = facts.difference(index.facts)
    if difference is None and index.chunk != PAIR_CHUNK:
        difference = f"chunk: {index.chunk} there, {PAIR_CHUNK} here"
    if difference is not None:
        raise UserError(f"{KEY}: '{path}' holds pairs of another recipe ({difference}); `raydmd pairs RECIPE --out "
                        f"ANOTHER_FOLDER` makes this one's")  # fmt: skip
    if index.total < count:
        raise UserError(f"{KEY}: '{path}' has {index.total} pairs, and the method needs {count}; `raydmd pairs RECIPE "
                        f"--out ANOTHER_FOLDER` makes as many")  # fmt: skip
    whole = count // index.chunk * index.chunk
    if count not in (index.total, whole):
        choices = " or ".join(str(n) for n in (whole, min(whole + index.chunk, index.total)) if n)
        raise UserError(f"{KEY}: of the {index.total} pairs in '{path}' the method takes {count}, which is inside a "
                        f"chunk of {index.chunk}: their last bits would be others; let it take {choices}")  # fmt: skip
    if missing := len(missing_shards(folder, index)):
        go_on = f"`raydmd pairs RECIPE --count {index.total} --out {shlex.quote(path)}`"
        raise UserError(f"{KEY}: '{path}' has {index.shards - missing} of {index.shards} shards; {go_on} goes on")
    return index


class ShardedPairs:
    """The first pairs of a folder, read as they are taken: shards are mapped into memory, and nothing is copied before.

    Args:
        path: the folder, with all its shards.
        count: how many pairs there are to be.
        device: where `take` puts them.

    Raises:
        UserError: no folder of pairs there, as this machine sees it, or too few.
    """

    def __init__(self, path: str | Path, count: int, device: torch.device | str = "cpu") -> None:
        self.folder, self.count, self.device = Path(path), count, torch.device(device)
        index = read_index(self.folder)
        if index is None:
            raise UserError(f"{KEY}: no {INDEX_FILE} in '{path}' on this machine; the folder has to be on storage that "
                            f"all machines share")  # fmt: skip
        if index.total < count:
            raise UserError(f"{KEY}: '{path}' has {index.total} pairs, not {count}")
        self.index = index
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        """Return N, the number of pairs."""
        return self.count

    def take(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """Return the noise, the results and the conditions of pairs by number [count], in that order: as `Pairs.take`.

        Raises:
            IndexError: a number that is no pair's.
            UserError: a shard that is not there or not whole, or a pair that is not what was written.
        """
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.count:
            raise IndexError(f"pairs 0..{self.count - 1}, not {numbers.min()}..{numbers.max()}")
        shard_of = numbers // self.index.shard_size
        parts, places = [], []
        for number in np.unique(shard_of).tolist() or [0]:
            place = np.flatnonzero(shard_of == number)
            parts.append(self._rows(number, numbers[place] - self.index.span(number)[0]))
            places.append(place)
        back = torch.from_numpy(np.argsort(np.concatenate(places), kind="stable"))
        taken = {name: torch.cat([part[name] for part in parts])[back].to(self.device) for name in parts[0]}
        noise, result = taken.pop("noise"), taken.pop("result")
        return noise, result, {name.removeprefix(CONDITIONS): value for name, value in taken.items()}

    def _rows(self, number: int, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return rows of a shard, once their checksums are those that were written."""
        file = self.folder / shard_name(number)
        if number not in self._shards:
            shard = _open(self.folder, self.index, number)
            if shard is None:
                raise UserError(f"{KEY}: {file} is not there or not whole; {self._again()}")
            self._shards[number] = shard
        shard = self._shards[number]
        taken = {name: value[torch.from_numpy(rows)] for name, value in shard.tensors.items()}
        if broken := shard.broken(rows, taken):
            pair = self.index.span(number)[0] + broken[0]
            raise UserError(f"{KEY}: pair {pair} in {file} is not what was written; {self._again()}")
        return taken

    def _again(self) -> str:
        place = shlex.quote(str(self.folder))
        return f"`raydmd pairs RECIPE --count {self.index.total} --out {place}` makes the shard again"


@dataclass(frozen=True)
class _Shard:
    """A shard's tensors by name, mapped into memory, and its pairs' checksums."""

    tensors: dict[str, torch.Tensor]
    checksums: list[str]

    def broken(self, rows: np.ndarray, taken: Mapping[str, torch.Tensor]) -> list[int]:
        """Return those of the rows [count] whose tensors [count, ...] are not what was written."""
        found = _checksums(taken)
        return [row for row, checksum in zip(rows.tolist(), found, strict=True) if self.checksums[row] != checksum]


def _open(folder: Path, index: PairIndex, number: int) -> _Shard | None:
    """Return a shard of a folder; None where the file is not there, cut short, or of other pairs."""
    start, count = index.span(number)
    try:
        with safe_open(folder / shard_name(number), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError):
        return None
    checksums = metadata.get("checksums", "").split(",")
    whole = (metadata.get("pairs"), metadata.get("first"), len(checksums)) == (index.digest(), str(start), count)
    fits = {"noise", "result"} <= tensors.keys() and all(len(value) == count for value in tensors.values())
    return _Shard(tensors, checksums) if whole and fits else None


def _named(noise: torch.Tensor, result: torch.Tensor, conditions: Conditions) -> dict[str, torch.Tensor]:
    named = {"noise": noise, "result": result, **{CONDITIONS + name: value for name, value in conditions.items()}}
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def _checksums(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a checksum of each row of tensors [N, ...]: 16 hexadecimal digits."""
    count = len(tensors["noise"])
    flat = [tensors[name].reshape(count, -1).contiguous() for name in sorted(tensors) if count]
    values = [value.view(torch.uint8).numpy() for value in flat]
    found = []
    for row in range(count):
        digest = blake2b(digest_size=8)
        for each in values:
            digest.update(each[row].data)
        found.append(digest.hexdigest())
    return found


def _is_ours(path: Path) -> bool:
    """Whether a job that was ended before it wrote ``pairs.json`` may have left this."""
    return path.name in ("prompts", "run.lock", "run.log", "error.txt") or path.name.startswith(".")


def _no_folder(folder: Path, make: str) -> UserError:
    siblings = [p.parent.name for p in folder.parent.glob(f"*/{INDEX_FILE}")] if folder.parent.is_dir() else []
    close = nearest(folder.name, siblings)
    hint = close if "did you mean" in close else f"; {make} makes it"
    return UserError(f"{KEY}: no folder '{folder}'{hint}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
