"""A teacher's fingerprint: what changes it, what does not, what it costs, and that no run goes on with another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from disturbed import head_alone
from hub import COMMIT, put_in_cache
from mortal import manifest, shards
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_families_diffusers import CLASSES, CONFIGS, SHAPES

from raydmd.config.recipe import dump_recipe
from raydmd.errors import UserError
from raydmd.models.base import Family
from raydmd.models.diffusers.hub import HubName, cached_snapshot, parse_hub_name
from raydmd.models.fingerprint import fingerprint_teacher, same_teacher
from raydmd.models.initial_student import fingerprint_initial
from raydmd.models.registry import build_family
from raydmd.runs.run import Run
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.launch import distill
from raydmd.runtime.preparation import check_initial_student

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A pipeline's folder with a tiny Wan in it."""
    folder = tmp_path_factory.mktemp("fingerprint") / "wan"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLASSES["wan"](**CONFIGS["wan"]).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text('{"flow_shift": 3.0}')
    return folder


def of(folder: Path | str, name: str = "wan") -> str:
    options = {"latent_shape": SHAPES[name]} if name in SHAPES else {}
    return fingerprint_teacher(build_family(name, str(folder), options))


@pytest.fixture
def copy(wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan, tmp_path / "elsewhere"))


def change_weight(folder: Path, place: int) -> None:
    file = folder / "transformer" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_it_goes_with_the_files_and_not_with_their_place(wan: Path, copy: Path) -> None:
    assert of(wan) == of(copy) and len(of(wan)) == 32
    (copy / "README.md").write_text("read me")
    assert of(copy) == of(wan)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_weight(folder, -1),
        lambda folder: change_weight(folder, len((folder / "transformer" / WEIGHTS).read_bytes()) // 2),
        lambda folder: edit(folder / "transformer/config.json", eps=2e-6),
        lambda folder: edit(folder / "scheduler/scheduler_config.json", flow_shift=5.0),
        lambda folder: edit(folder / "model_index.json", boundary_ratio=0.9),
        lambda folder: rename_tensor(folder),
    ],
)
def test_it_changes_with_every_part(wan: Path, copy: Path, change) -> None:
    change(copy)
    assert not same_teacher(of(copy), of(wan))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rename_tensor(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({(f"{key}.x" if key == name else key): value for key, value in tensors.items()}, file)


def test_embedded_teachers_have_one(teachers: dict[str, Path], tmp_path: Path) -> None:
    prints = {name: of(folder, name) for name, folder in teachers.items()}
    assert len(set(prints.values())) == len(prints)
    other = shutil.copytree(teachers["ring"], tmp_path / "ring")
    assert of(other, "ring") == prints["ring"]
    tensors = load_file(other / "model.safetensors")
    save_file({name: value + 1e-3 for name, value in tensors.items()}, other / "model.safetensors")
    assert of(other, "ring") != prints["ring"]


def test_forty_gigabytes_are_sampled_and_not_read(wan: Path, copy: Path) -> None:
    """Sparse files: 8 shards of 5 GB with 250 tensors each; reading them whole would take minutes."""
    folder, each = copy / "transformer", 20_000_000
    (folder / WEIGHTS).unlink()
    for shard in range(8):
        entries = {
            f"{shard}.{n}": {"dtype": "U8", "shape": [each], "data_offsets": [n * each, (n + 1) * each]}
            for n in range(250)
        }
        header = json.dumps(entries).encode()
        with (folder / f"diffusion_pytorch_model-{shard + 1:05d}-of-00008.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 250 * each)
    index = {shard.name: shard.name for shard in folder.glob("*.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    before = _read_bytes()
    first = of(copy)
    assert _read_bytes() - before < 400 * 2**20  # of 40 GB
    with (folder / "diffusion_pytorch_model-00005-of-00008.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert of(copy) != first


def _read_bytes() -> int:
    """Return how many bytes this process has read so far, from disk or cache."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_of_the_hub_it_names_the_commit(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cache laid out as huggingface_hub does: refs, snapshots of links into blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    put_in_cache(wan, tmp_path, "Someone/tiny-wan", COMMIT)
    for name in ("hf://Someone/tiny-wan", "hf://Someone/tiny-wan@main", f"hf://Someone/tiny-wan@{COMMIT}"):
        assert of(name) == f"{of(wan)}@{COMMIT}"
    assert same_teacher(of("hf://Someone/tiny-wan"), of(wan))
    assert cached_snapshot(HubName("Someone/tiny-wan", "other")) is None
    with pytest.raises(UserError, match="'hf://Someone/other' is not in this machine's cache, and HF_HUB_OFFLINE"):
        of("hf://Someone/other")


def test_hub_names() -> None:
    assert parse_hub_name("hf://a/b@refs/pr/3") == HubName("a/b", "refs/pr/3")
    assert str(parse_hub_name("hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers")) == "hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    for wrong in ("hf://a", "hf://a/b/c", "hf://a/b@", "hf:///b", "hf://a/../b", "hf://a/b@x y"):
        with pytest.raises(UserError, match="is not hf://owner/name or"):
            parse_hub_name(wrong)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "Git LFS pointer"),
        (lambda content: b"PK\3\4" * 100, "not a safetensors file"),
        (lambda content: b"", "not a safetensors file"),
        (lambda content: content + b"x", "something follows"),
        (lambda content: (4).to_bytes(8, "little") + b"[12]", "not a safetensors file"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_none_is_said_to_be(teachers: dict[str, Path], tmp_path: Path, spoil, words: str) -> None:
    folder = shutil.copytree(teachers["ring"], tmp_path / "ring")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if spoil is not None:
        file.write_bytes(spoil(content))
    with pytest.raises(UserError, match=words) as error:
        of(folder, "ring")
    assert str(error.value).startswith("teacher.path: ") and "\n" not in str(error.value)


def begun(recipe, folder: Path, fingerprint: str, initial: str = "") -> None:
    """Leave a folder as a run does that was stopped after its first iteration."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    record = manifest(
        1,
        updates={"generator": 1, "fake": 2},
        cursors={"generator": 16, "fake": 32},
        seed=recipe.seed,
        teacher=fingerprint,
        initial=initial,
    )
    Archive(str(folder / "checkpoints")).save(record, shards(1))


def swap(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value * 1.01 for name, value in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("own", [False, True])
def test_another_teacher_under_the_same_path_is_refused(own, quick, teachers, tmp_path: Path) -> None:
    """Also where the run trained its teacher itself; nothing of Ray is started for it."""
    folder = tmp_path / "run"
    place = folder / "teacher" if own else tmp_path / "ring"
    recipe = quick("ring", "teacher.path=null" if own else f"teacher.path={place}")
    begun(recipe, folder, of(teachers["ring"], "ring"))
    shutil.copytree(teachers["ring"], place)
    swap(place)
    with pytest.raises(UserError, match="teacher.path: .*holds another teacher") as error:
        distill(recipe, folder, console=Console(quiet=True))
    assert "\n" not in str(error.value) and str(place) in str(error.value)


def test_another_initial_student_under_the_same_path_is_refused(quick, teachers, tmp_path: Path) -> None:
    """As another teacher is, before anything of Ray is started; where it lies does not matter."""
    student = shutil.copytree(teachers["ring"], tmp_path / "student")
    recipe = quick("ring", f"method.init={student}")
    first = fingerprint_initial(str(student), 2)
    assert first == fingerprint_initial(str(teachers["ring"]), 2) != fingerprint_initial(str(student), 1)
    begun(recipe, tmp_path / "run", of(teachers["ring"], "ring"), first)
    check_initial_student(recipe, tmp_path / "run", first)
    swap(student)
    with pytest.raises(UserError, match="^method.init: .*holds another student than the run") as error:
        distill(recipe, tmp_path / "run", console=Console(quiet=True))
    assert "\n" not in str(error.value) and str(student) in str(error.value)
    begun(recipe, tmp_path / "older", of(teachers["ring"], "ring"))  # its manifests say nothing of it
    check_initial_student(recipe, tmp_path / "older", fingerprint_initial(str(student), 2))


def test_a_run_writes_it_down_and_goes_on_with_the_same_teacher(quick, teachers, tmp_path: Path) -> None:
    """In the manifest and in its events; moved to another file of the same content it is the same."""
    quiet, place, folder = Console(quiet=True), tmp_path / "ring", tmp_path / "run"
    shutil.copytree(teachers["ring"], place)
    recipe = quick("ring", f"teacher.path={place}", "iterations=2", "checkpoint.every=1")
    with head_alone(4):
        assert distill(recipe, folder, console=quiet, until=1) is False
        kept = Archive(str(folder / "checkpoints")).peek()
        assert kept is not None and kept.teacher == of(teachers["ring"], "ring") == Run(folder).fingerprint()
        swap(place)
        with pytest.raises(UserError, match="teacher.path"):
            distill(recipe, folder, console=quiet)
        shutil.rmtree(place)
        shutil.copytree(teachers["ring"], place)
        assert distill(recipe, folder, console=quiet) is True


def test_a_users_family_has_one_without_more(tmp_path: Path) -> None:
    class Own(Family):
        name = "own"
        load_teacher = conditions = unconditional = decode = lambda self, *_: None

    with pytest.raises(UserError, match="teacher.path: no folder"):
        fingerprint_teacher(Own(str(tmp_path / "none")))
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors")
    first = fingerprint_teacher(Own(str(tmp_path)))
    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    assert fingerprint_teacher(Own(str(tmp_path))) != first
