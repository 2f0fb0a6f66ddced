"""A user's texts as a run's prompts: a line each, a column of a table, or the captions of a folder of pictures.

Row k of `PromptTexts` is row k of the table of embeddings that is made of it, so a row is the same prompt in both.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raydmd.data.picture_metadata import FILES, metadata_columns
from raydmd.data.pictures import PictureFolder
from raydmd.errors import UserError, nearest

KEY = "prompts.path"
COLUMN_KEY = "prompts.column"
TEXT_COLUMNS = ("text", "prompt", "caption")  # looked for where no column is named
SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
LONGEST_FIELD = 2**24  # characters of a CSV file's value


@dataclass(frozen=True)
class PromptTexts:
    """N texts in the order of their file.

    Attributes:
        path: of the file or folder.
        texts: one a row.
        lines: of each, for errors: the file's line from 1, or of a Parquet file the row from 0.
        column: that they are from; None: a file of lines.
        empty: how many empty lines were left out.
        pictures: their names in the folder ``path``, one a row; None: there are none.
        counted: what ``lines`` counts.
        key: of the recipe, or the command's argument, for errors.
    """

    path: str
    texts: list[str]
    lines: list[int]
    column: str | None = None
    empty: int = 0
    pictures: list[str] | None = None
    counted: str = "line"
    key: str = KEY

    def __len__(self) -> int:
        """Return N."""
        return len(self.texts)

    @property
    def repeated(self) -> int:
        """How many rows have the text of an earlier one."""
        return len(self.texts) - len(set(self.texts))

    def where(self, row: int) -> str:
        """Say for errors where a row is from."""
        picture = f" ('{self.pictures[row]}')" if self.pictures is not None else ""
        return f"{self.counted} {self.lines[row]} of '{self.path}'{picture}"

    def digest(self, with_pictures: bool = False) -> str:
        """Return a hash of the texts in their order, and of the pictures' bytes: 32 hexadecimal digits.

        Raises:
            UserError: a picture that cannot be read.
        """
        digest = blake2b(digest_size=16)
        for text in self.texts:
            _add(digest, text.encode())
        for name in (self.pictures or []) if with_pictures else []:
            file = Path(self.path) / name
            try:
                _add(digest, blake2b(file.read_bytes(), digest_size=16).digest())
            except OSError as error:
                raise UserError(f"{self.key}: '{file}' cannot be read: {error.strerror}") from None
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """Return what is worth saying of the texts, a line each."""
        said = []
        if self.repeated:
            often = Counter(self.texts).most_common(1)[0]
            said.append(f"{self.key}: {self.repeated} of the {len(self)} prompts in '{self.path}' have the text of an "
                        f"earlier one, and are kept (the commonest is there {often[1]} times)")  # fmt: skip
        if self.empty:
            said.append(f"{self.key}: {self.empty} empty lines of '{self.path}' are left out")
        return said


def _add(digest: Any, content: bytes) -> None:
    digest.update(len(content).to_bytes(8, "little") + content)


def read_prompt_texts(
    path: str, column: str | None = None, embeddings: Sequence[str] = (), key: str = KEY
) -> PromptTexts | None:
    """Read the texts of a file or folder; None where it is a table of embeddings (or of what else a family takes).

    By its ending a file has a text a line (.txt), or a column of texts (.csv, .jsonl, .parquet, and a folder of
    .parquet files). A JSON line may be a text itself. A folder of pictures has their captions in its metadata, as
    `raydmd.data.pictures` reads it. Text is UTF-8, with or without a byte order mark; spaces around a text are left
    out, and so are the empty lines of a .txt file.

    Args:
        path: a file or folder, also a URI that pyarrow.fs knows (``s3://``, ``gs://``), but for pictures.
        column: of the texts; None: the one of `TEXT_COLUMNS` that is there.
        embeddings: the columns of a Parquet file that is no text, but what a family takes.
        key: of the recipe, or the command's argument, for errors.

    Raises:
        UserError: one line that names the file, and the line or row and the column: nothing there, not UTF-8, no such
            column or several, a row without a text, or no text at all.
    """
    place = _Place.find(path, key)
    if place.pictures:
        return _of_pictures(path, column, key)
    if place.suffix == ".parquet":
        return _of_parquet(place, column, embeddings, key)
    if place.suffix == ".txt":
        if column is not None:
            raise UserError(f"{COLUMN_KEY}: '{path}' is a text a line, without columns; leave it out")
        return _of_lines(place, key)
    if place.suffix in (".csv", ".jsonl"):
        return _of_rows(place, column, key)
    return None


@dataclass(frozen=True)
class _Place:
    """What lies at a path: files of one kind, or a folder of pictures.

    Attributes:
        path: as it was given.
        files: of the file system, by name.
        system: the file system.
        suffix: the files' ending; empty where it is none of ours.
        pictures: whether it is a folder of pictures.
    """

    path: str
    files: list[str]
    system: fs.FileSystem
    suffix: str
    pictures: bool = False

    @classmethod
    def find(cls, path: str, key: str) -> "_Place":
        """Look at a path.

        Raises:
            UserError: it cannot be reached.
        """
        try:
            system, inner = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
            kind = system.get_file_info(inner).type
            if kind != fs.FileType.Directory:
                suffix = Path(inner).suffix.lower()
                if kind == fs.FileType.NotFound and suffix in SUFFIXES and suffix != ".parquet":
                    raise UserError(f"{key}: no file '{path}'{_nearest_file(path)}")
                return cls(path, [inner], system, suffix if suffix in SUFFIXES and kind == fs.FileType.File else "")
            entries = system.get_file_info(fs.FileSelector(inner))
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UserError(f"{key}: cannot reach '{path}': {' '.join(str(error).split())[:200]}") from None
        tables = sorted(entry.path for entry in entries if entry.path.endswith(".parquet"))
        if tables:
            return cls(path, tables, system, ".parquet")
        local = "://" not in path
        pictures = local and any(entry.base_name in FILES for entry in entries)
        return cls(path, [], system, "", pictures or (local and _has_pictures(path)))

    def text(self, key: str) -> str:
        """Return the file's text, with its line ends as they are.

        Raises:
            UserError: it cannot be read, or is not UTF-8.
        """
        try:
            with self.system.open_input_stream(self.files[0]) as stream:
                content = bytes(stream.read())
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{key}: cannot read '{self.path}': {' '.join(str(error).split())[:200]}") from None
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            hint = " (it begins as UTF-16 does)" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise UserError(f"{key}: line {line} of '{self.path}' is not UTF-8{hint}; save the file as UTF-8") from None


def _of_lines(place: _Place, key: str) -> PromptTexts:
    texts, lines, empty = [], [], 0
    for number, line in enumerate(io.StringIO(place.text(key), newline=None), start=1):
        if text := line.strip():
            texts.append(text)
            lines.append(number)
        else:
            empty += 1
    return _checked(PromptTexts(place.path, texts, lines, empty=empty, key=key))


def _of_rows(place: _Place, column: str | None, key: str) -> PromptTexts:
    """Read the column of a .csv or .jsonl file."""
    content, texts, lines = io.StringIO(place.text(key), newline=""), list[str](), list[int]()
    chosen = column
    for number, row in (_csv_rows if place.suffix == ".csv" else _json_rows)(content, place.path, key):
        if isinstance(row, str):
            if column is not None:
                raise UserError(f"{COLUMN_KEY}: line {number} of '{place.path}' is a text without columns")
            value: Any = row
        else:
            if chosen is None or chosen not in row:
                head = "the header" if place.suffix == ".csv" else f"line {number}"  # of CSV, each row has all columns
                chosen = _choose(column, list(row), f"{head} of '{place.path}'", key)
            value = row[chosen]
        where = f"line {number} of '{place.path}'" + (f", column '{chosen}'" if chosen else "")
        texts.append(_text(value, where, key))
        lines.append(number)
    return _checked(PromptTexts(place.path, texts, lines, chosen, key=key))


def _csv_rows(content: io.StringIO, path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line that each row ends at, and its values; empty lines are passed over."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        reader = csv.DictReader(content, strict=True)
        names = reader.fieldnames or []
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{key}: '{path}' has two columns '{twice[0]}'")
        for row in reader:
            if None in row:
                raise UserError(f"{key}: line {reader.line_num} of '{path}' has more values than there are columns (is "
                                f"a text with commas not in quotes?)")  # fmt: skip
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{key}: line {reader.reader.line_num} of '{path}' is not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def _json_rows(content: io.StringIO, path: str, key: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{key}: line {number} of '{path}' is not JSON: {error}") from None
        if not isinstance(row, dict | str):
            raise UserError(f"{key}: line {number} of '{path}' is neither an object {{...}} nor a text")
        yield number, row


def _of_parquet(place: _Place, column: str | None, embeddings: Sequence[str], key: str) -> PromptTexts | None:
    texts: list[str] = []
    chosen = column
    for file in place.files:
        try:
            with place.system.open_input_file(file) as source:
                try:
                    table = pq.ParquetFile(source)
                except pa.ArrowInvalid:
                    return None  # no Parquet, as whoever reads it as embeddings says
                names = table.schema_arrow.names
                if embeddings and set(embeddings) <= set(names):
                    if column is not None:
                        raise UserError(f"{COLUMN_KEY}: '{place.path}' has embeddings in its columns "
                                        f"{', '.join(embeddings)}, which are taken; leave it out")  # fmt: skip
                    return None
                if column is None and not set(TEXT_COLUMNS) & set(names):
                    return None  # whoever reads it as embeddings says what it lacks
                chosen = _choose(column, names, f"'{place.path}'", key)
                values = table.read([chosen]).column(0).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{key}: '{file}' cannot be read as Parquet: {' '.join(str(error).split())[:200]}"
            ) from None
        for value in values:
            texts.append(_text(value, f"row {len(texts)} of '{place.path}', column '{chosen}'", key))
    return _checked(PromptTexts(place.path, texts, list(range(len(texts))), chosen, counted="row", key=key))


def _of_pictures(path: str, column: str | None, key: str) -> PromptTexts:
    found, names = metadata_columns(Path(path), key)
    chosen = _choose(column, names, f"'{found}'", key)
    folder = PictureFolder(path, (3, 1, 1), [chosen], key)
    assert folder.metadata is not None
    lines = folder.metadata.lines
    values = folder.metadata.columns[chosen]
    texts = [_text(str(value) if found.suffix == ".csv" else value, f"line {line} of '{found}', column '{chosen}'", key)
             for value, line in zip(values.tolist(), lines, strict=True)]  # fmt: skip
    return _checked(PromptTexts(path, texts, lines, chosen, pictures=list(folder.names), key=key))


def _choose(column: str | None, names: Sequence[str], where: str, key: str) -> str:
    """Return the column of texts.

    Raises:
        UserError: it is not there, or several may be meant.
    """
    if column is not None:
        if column not in names:
            raise UserError(f"{COLUMN_KEY}: {where} has no column '{column}'{nearest(column, names)}")
        return column
    found = [name for name in TEXT_COLUMNS if name in names]
    if not found:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise UserError(f"{key}: {where} has no column {', '.join(TEXT_COLUMNS)} ({has}); {COLUMN_KEY} says which one "
                        f"has the texts")  # fmt: skip
    if len(found) > 1:
        raise UserError(f"{key}: {where} has columns {' and '.join(found)}; {COLUMN_KEY} says which one is taken")
    return found[0]


def _text(value: Any, where: str, key: str) -> str:
    """Return a row's text.

    Raises:
        UserError: there is none, or what is there is no text.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{key}: {where} has no text")
    if not isinstance(value, str):
        raise UserError(f"{key}: {where} is no text: {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}: {where} has half of a surrogate pair, which is no character") from None
    return value.strip()


def _checked(found: PromptTexts) -> PromptTexts:
    if not found.texts:
        raise UserError(f"{found.key}: there is no prompt in '{found.path}'")
    return found


def _has_pictures(path: str) -> bool:
    return any(entry.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp") for entry in Path(path).iterdir())


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    if "://" in path or not folder.is_dir():
        return ""
    close = nearest(Path(path).name, [entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES])
    return close if "did you mean" in close else ""
