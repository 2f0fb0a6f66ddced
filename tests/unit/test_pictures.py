"""A folder of pictures: which files, in which order, how they are cut and resized, and what is refused."""

import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raydmd.data import pictures as module
from raydmd.data.pictures import PictureFolder
from raydmd.errors import UserError
from raydmd.models.pictures import encode_pictures, open_pictures, picture_conditions
from raydmd.models.registry import build_family

torch.set_num_threads(1)

KEY = "method.dmd2.pictures"


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def save(folder: Path, name: str, values: np.ndarray, **options: Any) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file, **options)
    return file


def one(folder: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the folder's only picture, in 0..255."""
    (picture,) = PictureFolder(folder, shape, [], KEY).take(np.array([0]))
    assert picture.dtype == torch.float32 and picture.shape == shape
    return ((picture.numpy() + 1) * 127.5).round().astype(np.uint8)


# ---- which files


def test_files_are_sorted_by_name_whatever_the_disk_says(tmp_path: Path) -> None:
    names = ["b.png", "a10.PNG", "a2.jpeg", "sub/z.webp", "sub/deep/a.bmp", "sub.jpg", "Z.jpg"]
    for number, name in enumerate(names):
        save(tmp_path, name, np.full((4, 4), 10 * number, np.uint8))
    for name in ("notes.txt", "cat.gif", "._a2.jpeg", ".hidden/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not a picture")
    folder = PictureFolder(tmp_path, (1, 4, 4), [], KEY)
    assert folder.names == sorted(names) == ["Z.jpg", "a10.PNG", "a2.jpeg", "b.png", "sub.jpg", "sub/deep/a.bmp",
                                             "sub/z.webp"]  # fmt: skip
    values = ((folder.take(np.array([3, 0, 3])) + 1) * 127.5).mean((1, 2, 3))
    assert torch.allclose(values, torch.tensor([0.0, 60.0, 0.0]), atol=1.0)
    with pytest.raises(IndexError, match=r"0\.\.6, not 7"):
        folder.take(np.array([7]))


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", "a.png", noise(4, 4, 1))
    (here := tmp_path / "here").mkdir()
    (here / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(here)
    assert PictureFolder(here, (1, 4, 4), [], KEY).names == ["link/a.png"]


# ---- decoding


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.bmp", {}), ("a.webp", {"lossless": True})])
def test_a_picture_of_the_size_comes_as_it_is(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    values = noise(6, 5, 3)
    save(tmp_path, name, values, **options)
    assert np.array_equal(one(tmp_path, (3, 6, 5)), values.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("size", "kept"),
    [((6, 10), np.s_[:, 2:8]), ((12, 6), np.s_[3:9]), ((6, 6), np.s_[:])],
    ids=["wide", "high", "square"],
)
def test_it_is_cut_around_its_centre(size: tuple[int, int], kept: Any, tmp_path: Path) -> None:
    values = noise(*size, 1)
    save(tmp_path, "a.png", values)
    assert np.array_equal(one(tmp_path, (1, 6, 6))[0], values[kept])


def test_it_is_cut_to_the_targets_proportions(tmp_path: Path) -> None:
    """For 4 x 8, of 32 x 32 the upper and the lower quarter go: as resized to 8 x 8, and cut then."""
    values = noise(32, 32, 1)
    save(tmp_path, "a.png", values)
    found, image = one(tmp_path, (1, 4, 8))[0], Image.fromarray(values)
    assert np.array_equal(found, np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))[2:6])
    assert not np.array_equal(found, np.asarray(image.resize((8, 4), Image.Resampling.BICUBIC)))  # squashed


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    """A pattern finer than the result's pixels becomes grey; to take every eighth pixel would leave black or white."""
    values = np.zeros((64, 64), np.uint8)
    values[:, ::2] = 255
    save(tmp_path, "a.png", values)
    assert np.abs(one(tmp_path, (1, 8, 8)).astype(int) - 127).max() <= 6
    assert np.abs(values[::8, ::8].astype(int) - 127).min() > 100


def test_enlarging_is_bicubic(tmp_path: Path) -> None:
    values = noise(4, 4, 3)
    save(tmp_path, "a.png", values)
    expected = np.asarray(Image.fromarray(values).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(one(tmp_path, (3, 16, 16)), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it(orientation: int, tmp_path: Path) -> None:
    """By the EXIF standard: what is stored first is, for 6, the right of the picture, top to bottom."""
    right = np.zeros((2, 3), np.uint8)
    right[0, 0], right[0, 2], right[1, 0] = 250, 160, 80
    stored = {1: right, 2: right[:, ::-1], 3: right[::-1, ::-1], 4: right[::-1], 5: right.T, 6: np.rot90(right),
              7: right.T[::-1, ::-1], 8: np.rot90(right, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, "a.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(one(tmp_path, (1, 2, 3))[0], right)


def test_grey_and_colour_become_each_other(tmp_path: Path) -> None:
    grey = noise(4, 4, 1)
    save(tmp_path / "grey", "a.png", grey)
    assert np.array_equal(one(tmp_path / "grey", (3, 4, 4)), np.stack([grey] * 3))
    save(tmp_path / "red", "a.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
    assert (one(tmp_path / "red", (1, 4, 4)) == 76).all()  # ITU-R 601: 0.299 of red


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    """Pillow's own conversion cuts at 255, or did."""
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369
    save(tmp_path, "a.png", values)
    assert np.array_equal(one(tmp_path, (1, 4, 4))[0], np.arange(16).reshape(4, 4) * 17)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_transparency_becomes_white(kind: str, tmp_path: Path) -> None:
    """What is hidden under it does not show; black would, and so would the hidden colour."""
    if kind == "palette":
        image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.save(tmp_path / "a.png", transparency=1)
        shown = (10, 20, 30)
    else:
        values = np.full((2, 2, 4 if kind == "RGBA" else 2), 60, np.uint8)
        values[..., -1] = [[255, 0], [0, 255]]
        save(tmp_path, "a.png", values)
        shown = (60, 60, 60)
    found = one(tmp_path, (3, 2, 2))
    assert (found[:, 0, 1] == 255).all() and (found[:, 1, 0] == 255).all()
    assert tuple(found[:, 0, 0]) == tuple(found[:, 1, 1]) == shown


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.full((2, 2, 4), (0, 0, 0, 128), np.uint8))
    assert (one(tmp_path, (1, 2, 2)) == 127).all()


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        save(tmp_path, f"{number}.png", np.full((4, 4), 50 * number, np.uint8))
    folder = PictureFolder(tmp_path, (1, 4, 4), [], KEY)
    monkeypatch.setattr(module, "CACHED_BYTES", 2 * 16)
    read: list[str] = []
    decode = module.read_picture

    def counted(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
        read.append(file.stem)
        return decode(file, shape)

    monkeypatch.setattr(module, "read_picture", counted)
    for numbers in ([0, 1], [1, 0], [2], [0], [1]):
        values = ((folder.take(np.array(numbers)) + 1) * 127.5).mean((1, 2, 3))
        assert torch.allclose(values, 50.0 * torch.tensor(numbers), atol=1e-3)
    assert read == ["0", "1", "2", "1"] and len(folder._cache) == 2


# ---- bad files


def refused(folder: Path, columns: tuple[str, ...] = (), shape: tuple[int, int, int] = (1, 8, 8)) -> str:
    with pytest.raises(UserError) as error:
        PictureFolder(folder, shape, columns, KEY).take(np.array([0]))
    words = str(error.value)
    assert words.startswith(f"{KEY}: ") and "\n" not in words
    return words


def bomb(width: int, height: int) -> bytes:
    """A PNG whose head says more pixels than its few bytes may become."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    assert re.search(r"no folder '.*/fases'; did you mean 'faces'\?", refused(tmp_path / "fases"))
    assert refused(tmp_path / "zzz").endswith("/zzz'")
    assert refused(save(tmp_path, "a.png", noise(4, 4, 1))).endswith("a.png', but a file")
    assert "'s3://bucket/faces' is no folder of a file system" in refused("s3://bucket/faces")  # type: ignore[arg-type]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("")
    assert "has no pictures (.bmp, .jpeg, .jpg, .png, .webp)" in refused(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    save(tmp_path, "a.png", noise(4, 4, 1))
    (tmp_path / "sub").mkdir(mode=0)
    assert "Permission denied" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_a_file_that_is_cut_short_is_named(name: str, tmp_path: Path) -> None:
    file = save(tmp_path, name, noise(64, 64, 3))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    assert f"'{file}' cannot be read as a picture: " in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"plain words", b"GIF89a" + bytes(50), b"\xff\xd8\xff\xe0" + bytes(9)])
def test_what_is_no_picture_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert f"'{tmp_path / 'a.jpg'}' cannot be read as a picture: " in refused(tmp_path)


def test_only_the_four_formats_are_decoded(tmp_path: Path) -> None:
    """A file is taken for what its bytes say, and no other decoder runs on it."""
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png", format="TIFF")
    assert "cannot identify" in refused(tmp_path)


@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow warns of the first, and refuses the second
def test_a_decompression_bomb_is_refused(side: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bomb(side, side))
    words = refused(tmp_path)
    assert "a.png' cannot be read" in words and f"({side**2} pixels) exceeds limit" in words


# ---- metadata


def folder_of(tmp_path: Path, count: int, text: str, name: str = "metadata.jsonl") -> Path:
    for number in range(count):
        save(tmp_path, f"{number}.png", noise(8, 8, 1, number))
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def json_lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_are_brought_into_the_pictures_order(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "label": number + 5, "text": f"no. {number}"} for number in (2, 0, 1)]
    rows[0]["file_name"] = "./2.png"
    folder = PictureFolder(folder_of(tmp_path, 3, "\ufeff" + json_lines(*rows)), (1, 8, 8), ["label", "text"], KEY)
    found = folder.rows(np.array([2, 0]))
    assert found["label"].tolist() == [7, 5] and found["label"].dtype == np.int64
    assert found["text"].tolist() == ["no. 2", "no. 0"]
    assert folder.where(2) == f"line 1 of '{tmp_path / 'metadata.jsonl'}', '2.png'"


def test_lists_become_arrays(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "e": [[number, 0.5]], "w": number or 0.5} for number in range(2)]
    folder = PictureFolder(folder_of(tmp_path, 2, json_lines(*rows)), (1, 8, 8), ["e", "w"], KEY)
    found = folder.rows(np.arange(2))
    assert found["e"].shape == (2, 1, 2) and found["e"].dtype == np.float64 and found["w"].tolist() == [0.5, 1.0]


def test_csv_says_the_same(tmp_path: Path) -> None:
    text = 'file_name,label,text,w\r\n1.png,3,"a, b\nc",1\r\n0.png, 4,2024,.5\r\n'
    folder = PictureFolder(folder_of(tmp_path, 2, text, "metadata.csv"), (1, 8, 8), ["label", "text", "w"], KEY)
    found = folder.rows(np.arange(2))
    assert found["label"].tolist() == [4, 3] and found["label"].dtype.kind == "i"
    assert found["text"].tolist() == ["2024", "a, b\nc"] and found["w"].tolist() == [0.5, 1.0]
    assert folder.metadata is not None and folder.metadata.lines == [4, 3]


def test_without_columns_no_metadata_is_read(tmp_path: Path) -> None:
    folder = PictureFolder(folder_of(tmp_path, 2, "not JSON"), (1, 8, 8), [], KEY)
    assert folder.metadata is None and folder.rows(np.arange(2)) == {} and len(folder) == 2


ROW, OTHER = {"file_name": "0.png", "label": 3}, {"file_name": "1.png", "label": 4}
WRONG_METADATA = {
    "a column": ("metadata.jsonl", json_lines({"file_name": "0.png", "lable": 3}, OTHER),
                 "line 1 of '.*' has no 'label'; did you mean 'lable'"),
    "no value": ("metadata.jsonl", json_lines(ROW, {**OTHER, "label": None}), "line 2 of .* has no value of 'label'$"),
    "no file_name": ("metadata.jsonl", json_lines({"filename": "0.png", "label": 3}),
                     "has no 'file_name'; did you mean 'filename'"),
    "no such picture": ("metadata.jsonl", json_lines(ROW, {**OTHER, "file_name": "1.pgn"}),
                        "line 2 of '.*metadata.jsonl': '1.pgn' is no picture in '.*'; did you mean '1.png'"),
    "above the folder": ("metadata.jsonl", json_lines({**ROW, "file_name": "../0.png"}), "'../0.png' is no picture"),
    "twice": ("metadata.jsonl", json_lines(ROW, OTHER, ROW), "line 3 of '.*': '0.png' has a row in line 1 already"),
    "no row": ("metadata.jsonl", json_lines(ROW), "'1.png' has no row in '.*metadata.jsonl'"),
    "not JSON": ("metadata.jsonl", json_lines(ROW) + "{'a'}\n", "line 2 of '.*' is not JSON: "),
    "a list": ("metadata.jsonl", "[1]\n", "line 1 of '.*' is not an object"),
    "not text": ("metadata.jsonl", None, "metadata.jsonl' cannot be read: 'utf-8' codec"),
    "several types": ("metadata.jsonl", json_lines(ROW, {**OTHER, "label": "4"}),
                      "line 2 of '.*': 'label' is '4', but in line 1 3"),
    "unequal lists": ("metadata.jsonl", json_lines({**ROW, "label": [1]}, {**OTHER, "label": [1, 2]}),
                      "'label' has lists of unequal lengths"),
    "csv, a column": ("metadata.csv", "file_name,labels\n0.png,3\n",
                      "the header of '.*metadata.csv' has no 'label'; did you mean 'labels'"),
    "csv, no value": ("metadata.csv", "file_name,label\n0.png,3\n1.png,\n", "line 3 of '.*' has no value of 'label'"),
    "csv, quotes": ("metadata.csv", 'file_name,label\n"0.png,3\n', "metadata.csv' cannot be read: "),
    "another name": ("metadata.json", json_lines(ROW, OTHER), "has no metadata.jsonl or metadata.csv with"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_METADATA)
def test_wrong_metadata(name: str, tmp_path: Path) -> None:
    file, text, words = WRONG_METADATA[name]
    folder_of(tmp_path, 2, text or "", file)
    if text is None:
        (tmp_path / file).write_bytes(b"\xff\xfe\x00")
    said = refused(tmp_path, ("label",))
    assert re.search(words, said), said


def test_one_file_of_metadata_at_the_top(tmp_path: Path) -> None:
    below = folder_of(tmp_path / "train", 2, json_lines(ROW, OTHER))
    assert refused(tmp_path, ("label",)).endswith(f"of each picture; there is one in '{below}'")
    (below / "metadata.csv").write_text("file_name,label\n0.png,3\n1.png,4\n")
    assert refused(below, ("label",)).endswith("has both metadata.jsonl and metadata.csv; leave one of them")


# ---- families


def test_digits_encode_what_they_decode() -> None:
    family = build_family("digits")
    assert family.picture_shape == (1, 8, 8)
    pixels = 2 * torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    latents = family.encode_pixels(pixels)
    assert latents.shape[1:] == family.latent_shape
    assert (2 * family.decode(latents) - 1 - pixels).abs().max() < 1e-6
    assert (2 * family.decode(latents / 2) - 1 - pixels).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ring", "family 'ring' does not"),
        ("wan", "family 'wan' does not"),
        ("qwen_image", "the teacher 'None' has no VAE"),
    ],
)
def test_families_without_an_encoder_say_so(name: str, words: str, tmp_path: Path) -> None:
    save(tmp_path, "a.png", noise(8, 8, 3))
    family = build_family(name)
    with pytest.raises(UserError, match=f"^{KEY}: .*{words}"):
        open_pictures(family, str(tmp_path), KEY)
    with pytest.raises(UserError, match=words):
        family.encode_pixels(torch.zeros(1, 3, 8, 8))


def test_pictures_and_rows_become_latents_and_conditions(tmp_path: Path) -> None:
    family = build_family("digits")
    folder = open_pictures(family, str(folder_of(tmp_path, 2, json_lines(OTHER, ROW))), KEY)
    latents, conditions = encode_pictures(family, folder, np.array([1, 0, 1]))
    assert conditions["label"].tolist() == [4, 3, 4]
    stored = [torch.from_numpy(noise(8, 8, 1, number)) / 255 for number in (1, 0, 1)]
    assert torch.allclose(family.decode(latents)[:, 0], torch.stack(stored), atol=1e-6)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (11, r"column 'label' has values outside 0\.\.9, e\.g\. 11 \(line 2 of '.*metadata.jsonl', '1.png'\)"),
        (4.5, r"column 'label' holds whole numbers 0\.\.9, not float64 \(line 1 of '.*'"),
        (2**70, r"column 'label' holds whole numbers 0\.\.9, not object"),
    ],
)
def test_a_row_that_the_family_does_not_take_is_named(label: Any, words: str, tmp_path: Path) -> None:
    family = build_family("digits")
    folder = open_pictures(family, str(folder_of(tmp_path, 2, json_lines(ROW, {**OTHER, "label": label}))), KEY)
    with pytest.raises(UserError, match=f"^{KEY}: {words}"):
        picture_conditions(family, folder, np.arange(2))
