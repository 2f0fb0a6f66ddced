"""A user's texts: every form in which they come, what is wrong with them, and the tables that are made of them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydmd.data.encoded_table import EncodedFacts, EncodedTable, file_content
from raydmd.data.prompt_files import read_prompt_texts
from raydmd.data.prompts import PromptTable, write_prompts
from raydmd.errors import UserError

TEXTS = ["a fox, red", 'the "other" fox', "ein Füchschen\u2028im Schnee", "a fox, red"]


def write_csv(file: Path, rows: list[list[str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows(rows)


def put_pictures(folder: Path, rows: list[dict[str, Any]], names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def put_parquet(file: Path, texts: list[Any]) -> None:
    pq.write_table(pa.table({"text": texts}), file)


def forms(folder: Path) -> dict[str, Path]:
    """Write the same texts in every form."""
    places = {name: folder / name for name in ("a.txt", "a.csv", "a.jsonl", "texts.jsonl", "a.parquet", "parts")}
    places["a.txt"].write_bytes("\r\n".join(["\ufeff" + TEXTS[0], "", *TEXTS[1:], "  "]).encode())
    write_csv(places["a.csv"], [["id", "caption"], *([str(k), text] for k, text in enumerate(TEXTS))])
    places["a.jsonl"].write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
    places["texts.jsonl"].write_text("\n\n".join(json.dumps(text) for text in TEXTS))
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string())}), places["a.parquet"])
    places["parts"].mkdir()
    for part in (0, 1):
        pq.write_table(pa.table({"caption": TEXTS[2 * part : 2 * part + 2]}), places["parts"] / f"{part}.parquet")
    names = ["c.png", "a.png", "d.jpg", "b.webp"]
    rows = [{"file_name": name, "text": text} for name, text in zip(sorted(names), TEXTS, strict=True)]
    places["pictures"] = put_pictures(folder / "pictures", rows[::-1], names)
    return places


def test_every_form_gives_the_same_texts(tmp_path: Path) -> None:
    found = {name: read_prompt_texts(str(place)) for name, place in forms(tmp_path).items()}
    assert {name: texts and texts.texts for name, texts in found.items()} == dict.fromkeys(found, TEXTS)
    assert len({texts.digest() for texts in found.values() if texts is not None}) == 1
    lines, pictures = found["a.txt"], found["pictures"]
    assert lines is not None and pictures is not None
    assert lines.lines == [1, 3, 4, 5] and lines.where(1) == f"line 3 of '{tmp_path / 'a.txt'}'"
    assert (lines.empty, lines.repeated) == (2, 1)
    assert any("1 of the 4 prompts" in note for note in lines.notes()) and len(lines.notes()) == 2
    assert pictures.pictures == ["a.png", "b.webp", "c.png", "d.jpg"] and "'b.webp'" in pictures.where(1)
    assert pictures.digest(with_pictures=True) != pictures.digest()
    before = pictures.digest(with_pictures=True)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "pictures" / "c.png")
    assert pictures.digest(with_pictures=True) != before
    assert read_prompt_texts(f"file://{tmp_path}/a.txt").texts == TEXTS  # type: ignore[union-attr]
    (tmp_path / "one.txt").write_text("7")
    assert read_prompt_texts(str(tmp_path / "one.txt")).texts == ["7"]  # type: ignore[union-attr]


def test_the_hash_tells_where_a_text_ends(tmp_path: Path) -> None:
    for name, text in (("a", "ab\nc"), ("b", "a\nbc"), ("c", "c\nab")):
        (tmp_path / f"{name}.txt").write_text(text)
    digests = [read_prompt_texts(str(tmp_path / f"{name}.txt")).digest() for name in "abc"]  # type: ignore[union-attr]
    assert len(set(digests)) == 3


def test_a_column_may_be_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["long", "text"], ["x, y", "y"], ["z", "w"]])
    found = read_prompt_texts(str(tmp_path / "a.csv"), "long")
    assert found is not None and (found.texts, found.column) == (["x, y", "z"], "long")
    with pytest.raises(UserError, match=r"^prompts.column: the header of '.*a.csv' has no column 'lnog'; did you mean"):
        read_prompt_texts(str(tmp_path / "a.csv"), "lnog")


def test_embeddings_are_no_texts(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", {"x": np.zeros((2, 3)), "text": ["a", "b"]})
    assert read_prompt_texts(str(path), embeddings=["x"]) is None
    assert read_prompt_texts(str(path), embeddings=["x", "y"]).texts == ["a", "b"]  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"^prompts.column: '.*' has embeddings in its columns x"):
        read_prompt_texts(str(path), "text", ["x"])
    (tmp_path / "b.parquet").write_text("no Parquet")
    for other in (tmp_path / "b.parquet", tmp_path / "none.parquet", tmp_path / "none"):
        assert read_prompt_texts(str(other), embeddings=["x"]) is None


BAD: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "not UTF-8": ("a.txt", lambda f: f.write_bytes(b"fine\nF\xfcchse\n"), ["line 2 of", "is not UTF-8"]),
    "UTF-16": ("a.txt", lambda f: f.write_text("a fox", "utf-16"), ["line 1 of", "UTF-16"]),
    "empty": ("a.txt", lambda f: f.write_text(""), ["there is no prompt in"]),
    "blank": ("a.txt", lambda f: f.write_text("\ufeff\n \n"), ["there is no prompt in"]),
    "header alone": ("a.csv", lambda f: f.write_text("text\n"), ["there is no prompt in"]),
    "empty CSV": ("a.csv", lambda f: f.write_text(""), ["there is no prompt in"]),
    "no such column": ("a.csv", lambda f: f.write_text("id,name\n1,x\n"),
                       ["the header of", "no column text, prompt", "id, name"]),
    "two columns": ("a.csv", lambda f: f.write_text("text,prompt\n1,x\n"), ["text and prompt", "prompts.column"]),
    "one name twice": ("a.csv", lambda f: f.write_text("text,text\n1,x\n"), ["two columns 'text'"]),
    "a comma": ("a.csv", lambda f: f.write_text("id,text\n1,a fox, red\n"), ["line 2 of", "more values"]),
    "no value": ("a.csv", lambda f: f.write_text("id,text\n1,x\n2\n"), ["line 3 of", "column 'text' has no text"]),
    "open quote": ("a.csv", lambda f: f.write_text('text\n"a\nb'), ["line 3 of", "is not CSV"]),
    "not JSON": ("a.jsonl", lambda f: f.write_text('{"text": "a"}\n{"text": \n'), ["line 2 of", "is not JSON"]),
    "a list": ("a.jsonl", lambda f: f.write_text('{"text": "a"}\n["b"]\n'), ["line 2 of", "neither an object"]),
    "null": ("a.jsonl", lambda f: f.write_text('{"text": "a"}\n{"text": null}'), ["line 2 of", "'text' has no text"]),
    "a number": ("a.jsonl", lambda f: f.write_text('{"text": 7}'), ["line 1 of", "column 'text' is no text: '7'"]),
    "a row without": ("a.jsonl", lambda f: f.write_text('{"text": "a"}\n{"txet": "b"}'), ["line 2 of", "no column"]),
    "surrogate": ("a.jsonl", lambda f: f.write_text('{"text": "\\ud800"}'), ["line 1 of", "surrogate"]),
    "null in Parquet": ("a.parquet", lambda f: put_parquet(f, ["a", None]), ["row 1 of", "has no text"]),
    "numbers in Parquet": ("a.parquet", lambda f: put_parquet(f, [1, 2]), ["row 0 of", "is no text"]),
    "missing picture": ("d", lambda f: put_pictures(f, [{"file_name": f"{n}.png", "text": n} for n in "ab"], ["a.png"]),
                        ["line 2 of", "'b.png' is no picture in"]),
    "picture without": ("d", lambda f: put_pictures(f, [{"file_name": "a.png", "text": "x"}], ["a.png", "b.png"]),
                        ["'b.png' has no row in"]),
    "caption missing": ("d", lambda f: put_pictures(f, [{"file_name": "a.png", "text": " "}], ["a.png"]),
                        ["line 1 of", "metadata.jsonl', column 'text' has no text"]),
    "no file": ("a.txt", lambda f: (f.parent / "b.txt").write_text("x"), ["no file", "did you mean 'b.txt'?"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    name, write, expected = BAD[case]
    write(tmp_path / name)
    with pytest.raises(UserError) as error:
        read_prompt_texts(str(tmp_path / name))
    words = str(error.value)
    assert words.startswith("prompts.path: ") and "\n" not in words and str(tmp_path) in words
    assert all(part in words for part in expected), words


FACTS = EncodedFacts("f", "e" * 32, "t" * 32, 5, 2, ["x", "x_mask"], {"dtype": "float32"})


def part(number: int, length: int, count: int = 2) -> bytes:
    x = np.arange(count * length * 3, dtype=np.float32).reshape(count, length, 3) + 100 * number
    return file_content(FACTS, number, {"x": x, "x_mask": np.ones((count, length), int)}, number)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_of_several_lengths_are_one_table(scheme: str, tmp_path: Path) -> None:
    table = EncodedTable(f"{scheme}{tmp_path}/t", FACTS, "--out")
    table.claim()
    for number, (length, count) in enumerate([(4, 2), (2, 2), (3, 1)]):
        table.commit(number, part(number, length, count))
    assert table.found() == {0: 0, 1: 1, 2: 2}
    rows = PromptTable(table.place, ["x", "x_mask"]).take(np.array([4, 0, 3]))
    assert rows["x"].shape == (3, 4, 3) and rows["x_mask"].sum(1).tolist() == [3, 4, 2]
    assert np.array_equal(rows["x"][0, :3].reshape(-1), np.arange(9) + 200) and not rows["x"][0, 3:].any()
    assert np.array_equal(rows["x"][2, :2].reshape(-1), np.arange(6, 12) + 100)
    with pytest.raises(UserError, match="lists of unequal lengths"):  # without a mask, padding would be seen
        PromptTable(table.place, ["x"]).take(np.array([4, 0]))


def test_what_is_not_whole_or_not_ours_is_made_again(tmp_path: Path) -> None:
    table = EncodedTable(str(tmp_path / "t"), FACTS, "--out")
    table.claim()
    for number in (0, 1):
        table.commit(number, part(number, 2))
    file = tmp_path / "t" / "rows-00000001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert table.found() == {0: 0}
    table.commit(1, part(0, 2))  # of another place in the table
    assert table.found() == {0: 0}
    (tmp_path / "t" / ".rows-00000002.parquet.1.part").write_bytes(b"half")
    table.claim()
    assert len(PromptTable(table.place)) == 4
    other = EncodedFacts(**{**FACTS.__dict__, "options": {"dtype": "bfloat16"}})
    assert other.key() != FACTS.key()
    with pytest.raises(UserError, match=r"^--out: '.*' holds embeddings of something else \(other teacher.options\)"):
        EncodedTable(str(tmp_path / "t"), other, "--out").claim()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no embeddings"):
        EncodedTable(str(tmp_path / "mine"), FACTS, "--out").claim()


def test_two_drivers_share_a_table(tmp_path: Path) -> None:
    """Both may make the same files; what one has made, and may read, stays to the bit."""
    first, second = (EncodedTable(str(tmp_path / "t"), FACTS, "--out") for _ in range(2))
    meanwhile = second._read

    def read(name: str) -> bytes | None:
        """Read the index before the other driver writes it, and its first file."""
        found = meanwhile(name)
        first.claim()
        first.commit(0, part(0, 4))
        return found

    second._read = read  # type: ignore[method-assign]
    second.claim()
    opened = PromptTable(first.place, ["x"])
    for table, length in ((second, 2), (first, 4)):  # other bytes, as another kind of machine may compute
        for number in (0, 1):
            table.commit(number, part(number, length))
    assert second.found() == first.found() == {0: 0, 1: 1}
    files = sorted((tmp_path / "t").glob("rows-*"))
    assert [file.read_bytes() for file in files] == [part(0, 4), part(1, 2)]
    assert np.array_equal(opened.take(np.array([1]))["x"].reshape(-1), np.arange(12, 24))
    assert not [*(tmp_path / "t").glob(".*")]


def test_values_of_bfloat16_and_zeros_take_little_room() -> None:
    x = np.random.default_rng(0).standard_normal((2, 64, 100)).astype(np.float32)
    x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    x[:, 32:] = 0
    content = file_content(FACTS, 0, {"x": x, "x_mask": np.ones((2, 64), int)}, None)
    assert len(content) < 0.3 * x.nbytes
    found = pq.read_table(pa.BufferReader(content)).column("x").combine_chunks()
    assert np.array_equal(np.array(found.flatten().flatten()), x.reshape(-1))
