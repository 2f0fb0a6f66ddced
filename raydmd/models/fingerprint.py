"""A teacher's fingerprint: whether the weights under a path are those that a run was made with, told in seconds."""

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.safetensors_files import read_header

SAMPLE_BYTES = 64 * 2**10  # of every tensor: half from its begin, half from its end
REVISION = "@"  # between the hash and the hub's revision


def fingerprint_teacher(family: Family) -> str:
    """Return the fingerprint of a family's teacher: 32 hexadecimal digits.

    Of one that is quantized, ``-`` and the kind follow (``-int8``); of the hub's, ``@`` and the commit.

    It covers what the denoiser is made of (`Family.teacher_files`): each config whole, of each safetensors file the
    header, the size and 64 KiB of every tensor. Nothing is loaded: a folder of 40 GB takes seconds. Where the folder
    lies does not matter.

    Raises:
        UserError: ``teacher.path: ...``: no teacher there, or a file that cannot be read.
    """
    revision, kind = family.teacher_revision(), family.quantization
    weights = fingerprint_files(family.teacher_files()) + ("" if kind == "none" else f"-{kind}")
    return weights + (f"{REVISION}{revision}" if revision else "")


def fingerprint_encoder(family: Family) -> str:
    """Return the fingerprint of what encodes a family's prompts (`Family.encoder_files`): 32 hexadecimal digits.

    Raises:
        UserError: ``teacher.path: ...``: there is none, or a file that cannot be read.
    """
    return fingerprint_files(family.encoder_files())


def fingerprint_files(files: Mapping[str, Path]) -> str:
    """Return the fingerprint of files by name, as that of a teacher's: 32 hexadecimal digits.

    Raises:
        UserError: ``teacher.path: ...``: a file that cannot be read.
    """
    digest = blake2b(digest_size=16)
    for label, file in sorted(files.items()):
        content = _content(file)
        digest.update(f"{label}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def same_teacher(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, wherever these came from."""
    return one.partition(REVISION)[0] == other.partition(REVISION)[0]


def commit_of(fingerprint: str) -> str | None:
    """Return the hub's commit that a fingerprint names, if it does."""
    return fingerprint.partition(REVISION)[2] or None


def _content(file: Path) -> bytes:
    """Return what is hashed of a file: a small hash of a large one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if file.suffix != ".safetensors":
            return file.read_bytes()
        header, digest = read_header(file), blake2b()
        digest.update(header.text)
        with file.open("rb", buffering=0) as stream:
            for entry in sorted(header.tensors.values(), key=lambda entry: entry.begin):
                for begin, end in _sampled(entry.begin, entry.end):
                    stream.seek(begin)
                    digest.update(stream.read(end - begin))
        return header.size_bytes.to_bytes(8, "little") + digest.digest()
    except OSError as error:
        raise UserError(f"teacher.path: {file} is not readable: {error.strerror}") from error


def _sampled(begin: int, end: int) -> list[tuple[int, int]]:
    """Return which bytes of a tensor's are read."""
    if end - begin <= SAMPLE_BYTES:
        return [(begin, end)]
    half = SAMPLE_BYTES // 2
    return [(begin, begin + half), (end - half, end)]
