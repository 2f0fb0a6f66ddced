"""Files below one folder, on a disk or in an object store, whose names never show half of what was written."""

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raydmd.atomic import storage_error
from raydmd.errors import StorageError, UserError
from raydmd.locations import KEY, Location, parse_location
from raydmd.runtime.checkpoint.shards import PIECE

AHEAD = 8 * PIECE  # bytes that an upload in the background may hold copies of
ATTEMPTS, CONNECT, SILENCE = (
    4,
    5.0,
    10.0,
)  # of a request; seconds: an endpoint that is not there is given up in half a minute


class Store:
    """A folder of files.

    Args:
        uri: a path, file://, s3:// or gs://.

    Raises:
        UserError: ``checkpoint.path: ...``: the URI cannot be used.
    """

    def __init__(self, uri: str) -> None:
        self.location = parse_location(uri)
        try:
            self.files: fs.FileSystem = _open(self.location)
        except (OSError, pa.ArrowException, TypeError) as error:
            raise UserError(f"{KEY}: {self} cannot be opened: {one_line(error)}") from None
        self.root = self.location.path
        self.progress: Callable[[], None] = lambda: None  # called at each piece that is written or read

    def __str__(self) -> str:
        return str(self.location)

    @property
    def local(self) -> bool:
        """Whether it is a disk's."""
        return isinstance(self.files, fs.LocalFileSystem)

    def write(self, path: str, content: Iterable[bytes | memoryview]) -> tuple[str, int]:
        """Write a file from its pieces; return its sha256 and its bytes.

        A disk's file gets its name once it is whole and on the disk: without the fsync a power cut after the rename
        could leave an empty file under that name (the checksum would tell) when the checkpoint before it is deleted
        already. Where it cannot be written, its part is removed, and so are the folders that are empty then. An object
        appears when its stream is closed. Arrow closes it on an exception too, with what it has by then: so no
        manifest names an object before ``write`` has returned, and none that is named is rewritten.
        """
        target = f"{self.root}/{path}"
        name, digest, size, held = target, hashlib.sha256(), 0, 0
        if self.local:
            self.files.create_dir(target.rpartition("/")[0])
            name = f"{target}.part"
        try:
            with self.files.open_output_stream(name, compression=None) as stream:
                for piece in content:
                    digest.update(piece)
                    stream.write(piece)
                    self.progress()
                    size, held = size + len(piece), held + len(piece)
                    if held >= AHEAD and not self.local:
                        stream.flush()
                        held = 0
            if self.local:
                with open(name, "rb") as part:
                    os.fsync(part.fileno())
                self.files.move(name, target)
        except BaseException:
            if self.local:
                self._remove_part(Path(name))
            raise
        return digest.hexdigest(), size

    def read(self, path: str, record: dict[str, Any] | None = None) -> bytes:
        """Return a file's bytes.

        Args:
            path: its name below the folder.
            record: its "sha256" and "bytes", if they are to be checked.

        Raises:
            ValueError: they differ.
        """
        content, digest = io.BytesIO(), hashlib.sha256()
        with self.files.open_input_file(f"{self.root}/{path}") as stream:
            if record is not None and stream.size() != record["bytes"]:
                raise ValueError(f"{path}: {stream.size()} bytes, {record['bytes']} expected")
            while piece := stream.read(PIECE):
                digest.update(piece)
                content.write(piece)
                self.progress()
        if record is not None and digest.hexdigest() != record["sha256"]:
            raise ValueError(f"{path}: its checksum differs")
        return content.getvalue()

    def sizes(self, paths: list[str]) -> list[int | None]:
        """Return each file's bytes; None where there is no such file."""
        entries = self.files.get_file_info([f"{self.root}/{path}" for path in paths]) if paths else []
        return [entry.size if entry.is_file else None for entry in entries]

    def listing(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder; none where it is not there."""
        entries = self.files.get_file_info(fs.FileSelector(f"{self.root}/{folder}".rstrip("/"), allow_not_found=True))
        files = sorted(entry.base_name for entry in entries if entry.is_file)
        return files, sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)

    def delete(self, path: str, folder: bool = False) -> None:
        """Delete a file or a whole folder, unless it is gone already."""
        with suppress(FileNotFoundError):
            (self.files.delete_dir if folder else self.files.delete_file)(f"{self.root}/{path}")

    def modified(self, paths: list[str]) -> list[float | None]:
        """Return when each file was last written, in seconds since 1970 by the storage's clock; None: no such file."""
        entries = self.files.get_file_info([f"{self.root}/{path}" for path in paths])
        return [entry.mtime_ns / 1e9 if entry.is_file and entry.mtime_ns else None for entry in entries]

    def failure(self, error: Exception) -> StorageError | None:
        """Return what is said of a disk that is full or gone; None where the error is another one."""
        return storage_error(f"{KEY}: {self}", error) if self.local else None

    def lost(self, error: Exception) -> bool:
        """Whether an error means that a file is not there or spoiled, and not that the store cannot be reached.

        Skipping checkpoints because the network is down would begin a run anew and delete them.
        """
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            return True
        return self.local and error.errno in (None, errno.EIO, errno.EISDIR, errno.ENOTDIR)

    def _remove_part(self, part: Path) -> None:
        with suppress(OSError):
            part.unlink()
        with suppress(OSError):
            for folder in part.parents:
                if folder == Path(self.root) or Path(self.root) not in folder.parents:
                    break
                folder.rmdir()  # an error where it is not empty


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _open(location: Location) -> fs.FileSystem:
    options: dict[str, Any] = dict(location.options)
    if location.scheme == "file":
        return fs.LocalFileSystem()
    if location.scheme == "gs":
        limit = timedelta(seconds=ATTEMPTS * SILENCE)
        return fs.GcsFileSystem(anonymous=location.anonymous, retry_time_limit=limit, **options)
    if "region" not in options:  # a server of one's own has none; of Amazon's, the bucket's
        own = "endpoint_override" in options or any(name.startswith("AWS_ENDPOINT_URL") for name in os.environ)
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        bucket = location.path.partition("/")[0]
        options["region"] = named or ("us-east-1" if own else fs.resolve_s3_region(bucket))
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return fs.S3FileSystem(connect_timeout=CONNECT, request_timeout=SILENCE, retry_strategy=retry, **options)
