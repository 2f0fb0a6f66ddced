"""`raydmd generate` and `raydmd serve` take an export: it makes what its run makes, and what cannot be is refused."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from hub_uploads import upload_server
from local_serving import pixels, serving
from run_folders import make_run
from safetensors.torch import load_file, save_file
from served import api
from test_every_family import recipe_of

from raydmd import cli
from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.evaluation.prompts import in_turn
from raydmd.evaluation.sizes import size_words, trained_sizes
from raydmd.export.export import export_run
from raydmd.export.exported import Export, open_student
from raydmd.export.formats import FORMATS
from raydmd.export.push import push
from raydmd.models.base import save_teacher
from raydmd.models.diffusers.teacher_folder import CONFIG
from raydmd.models.registry import build_family
from raydmd.models.tiny import TINY_MODELS
from raydmd.models.tiny.qwen_image import WIDTH
from raydmd.models.tiny.text_encoders import put_text_encoder
from raydmd.runs.run import Run, recipe_family
from raydmd.runs.student import Student
from raydmd.sampling.student import sample_student
from raydmd.serving.card import read_card
from raydmd.serving.contract import GenerationRequest
from raydmd.serving.local import local_pipeline
from raydmd.serving.settings import Serving

torch.set_num_threads(1)

TEXT = "a red fox"
RUNS = {  # family, overrides of the recipe
    "qwen_image": ("qwen_image", ("method.timestep_shift=3",)),
    "wan": ("wan", ("method.timestep_shift=3",)),
    "wan-full": ("wan", ("method.timestep_shift=3", "method.experts.kind=full")),
    "qwen_image-full": (
        "qwen_image",
        ("method.timestep_shift=3", "method.experts.kind=full", "prompts.buckets=[[64, 48], [64, 64]]"),
    ),
    "wan22": ("wan22", ("method.times=[1, 0.875]", "method.steps=2", "method.boundaries=[0.875]")),
    "wan22-one": (
        "wan22",
        ("method.timestep_shift=3", "method.phases=1", "iterations=1"),
    ),  # an expert of both networks
    "stable_diffusion": ("stable_diffusion", ("method.phases=1", "iterations=1")),
}
EXPORTS = [
    *(("qwen_image", format) for format in FORMATS), *(("wan", format) for format in FORMATS),
    *(("wan22", format) for format in FORMATS), *(("wan22-one", format) for format in FORMATS),
    ("wan-full", "diffusers"), ("qwen_image-full", "diffusers"),
    ("stable_diffusion", "diffusers"), ("stable_diffusion", "lora"),
]  # fmt: skip
EXACT = ("lora", "peft", "lightning")  # the same adapters on the same network


class Made:
    """Runs on tiny models, whose teachers have text encoders where these are small, and exports of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: dict[str, Run] = {}
        self.exports: dict[tuple[str, str], Path] = {}
        for name, (family, overrides) in RUNS.items():
            tiny, teacher = TINY_MODELS[family], root / family
            if not teacher.is_dir():
                tiny.save(teacher)
                if family != "stable_diffusion":
                    add_text_encoder(family, teacher)
            common = ("optimizer.generator.lr=0.1", "ema=0", "batch.size=2", "batch.micro=2")
            recipe = recipe_of(tiny, teacher, *common, *overrides)
            prompts = PromptTable(str(recipe.prompts.path), recipe_family(recipe).condition_columns)
            self.runs[name] = make_run(recipe, root / f"{name}-run", prompts)
        for name, format in EXPORTS:
            self.exports[name, format] = root / f"{name}-{format}"
            export_run(self.runs[name], format, self.exports[name, format], checked=False)

    def copy(self, name: str, format: str, place: Path) -> Path:
        return Path(shutil.copytree(self.exports[name, format], place))


def add_text_encoder(family: str, teacher: Path) -> None:
    """Put a text encoder beside a teacher's networks and VAE, and name all of them in model_index.json."""
    file = teacher / "model_index.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    put_text_encoder(family.removesuffix("22"), WIDTH, teacher)  # which writes the file anew
    index = json.loads(file.read_text())
    if "boundary_ratio" in before:
        index["boundary_ratio"] = before["boundary_ratio"]
    names = {"transformer": CONFIG, "transformer_2": CONFIG, "vae": CONFIG, "scheduler": "scheduler_config.json"}
    for part, name in names.items():
        if (teacher / part).is_dir():
            index[part] = ["diffusers", json.loads((teacher / part / name).read_text())["_class_name"]]
    file.write_text(json.dumps(index))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def sampled(student: Student, run: Run, seed: int = 3) -> torch.Tensor:
    """Return latents of two samples of the run's own first prompts."""
    conditions = in_turn(run.recipe, run.family, 2)
    return sample_student(
        student.family, student.experts_on("cpu"), student.check_finished(), conditions, 2, seed=seed
    ).latents  # fmt: skip


def visited(student: Student) -> list[float]:
    return [t for phase in student.phases for t in phase.times[:-1]]


def test_an_export_makes_what_its_run_makes(made: Made) -> None:
    for name, run in made.runs.items():
        right = sampled(run, run)
        largest = max(1.0, float(right.abs().max()))
        assert (sampled(run, run, seed=4) - right).abs().max() > 1e-2 * largest
        for format in (format for known, format in EXPORTS if known == name):
            student = open_student(made.exports[name, format])
            assert isinstance(student, Export) and visited(student) == visited(run)
            latents = sampled(student, run)
            assert (latents - right).abs().max() <= (0 if format in EXACT else 1e-5 * largest), (name, format)
            ours, theirs = ((each.decode_video(x) * 255).round() for each, x in
                            ((run.family, right), (student.family, latents)))  # fmt: skip
            assert (ours - theirs).abs().max() <= 1, (name, format)
            student.check_content()


def test_a_size_of_the_runs_buckets(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, student = made.runs["qwen_image-full"], Export(made.exports["qwen_image-full", "diffusers"])
    sizes = [size_words(sized) for sized in trained_sizes(student.recipe, student.family)]
    assert sizes == [size_words(sized) for sized in trained_sizes(run.recipe, run.family)] == ["48x64", "64x64"]
    assert read_card(Serving(run=str(student.folder)), student).sizes == ((48, 64), (64, 64))
    right = pictures(run.folder, tmp_path / "run", "--size", "64x64")
    found = pictures(student.folder, tmp_path / "export", "--size", "64x64")
    for one, other in zip(right, found, strict=True):
        height, width, _ = pixels(one).shape  # enlarged
        assert width == height and abs(pixels(one) - pixels(other)).max() <= 1
    of_one = ["generate", str(made.exports["qwen_image", "lora"]), "--prompt", TEXT, "--size", "64x64"]
    assert cli.run(of_one) == 2
    assert "--size 64x64: the students were not trained for it" in capsys.readouterr().err


def test_the_experts_matter(made: Made) -> None:
    """Else an export that is read as its teacher, or with the wrong expert, would be taken for right."""
    for key in (
        ("wan-full", "diffusers"), ("qwen_image", "peft"), ("qwen_image", "diffusers"), ("wan22-one", "lightning"),
    ):  # fmt: skip
        run, student = made.runs[key[0]], Export(made.exports[key])
        right, (first, second) = sampled(run, run), student.said.experts
        swapped = (first.model_copy(update={"place": second.place}), second.model_copy(update={"place": first.place}))
        student.said = student.said.model_copy(update={"experts": swapped})
        assert (sampled(student, run) - right).abs().max() > 1e-3, key


def pictures(folder: Path | str, out: Path, *more: str) -> list[bytes]:
    words = ["generate", str(folder), "--prompt", TEXT, "-n", "2", "--seed", "5", "--out", str(out), *more]
    assert cli.run(words) == 0
    return [file.read_bytes() for file in sorted(out.iterdir())]


def test_the_command_makes_the_runs_pictures_of_a_text(made: Made, tmp_path: Path) -> None:
    right = pictures(made.runs["qwen_image"].folder, tmp_path / "run")
    base = shutil.copytree(made.root / "qwen_image", tmp_path / "elsewhere")
    for format in ("diffusers", "lora"):
        moved = made.copy("qwen_image", format, tmp_path / f"moved-{format}")
        if format != "diffusers":
            said = json.loads((moved / "export.json").read_text())
            said["teacher"]["path"] = "/not/there"
            (moved / "export.json").write_text(json.dumps(said))
        more = () if format == "diffusers" else ("--base", str(base))
        found = pictures(moved, tmp_path / format, *more)
        for one, other in zip(right, found, strict=True):
            assert abs(pixels(one) - pixels(other)).max() <= (0 if format in EXACT else 1), format
    assert abs(pixels(right[0]) - pixels(right[1])).max() > 1


def test_an_expert_of_two_networks_is_read_from_its_two_single_files(made: Made, tmp_path: Path) -> None:
    run, folder = made.runs["wan22-one"], made.exports["wan22-one", "lightning"]
    student = Export(folder)
    assert len(run.phases) == 1 and [(each.network, each.place, each.times) for each in student.said.experts] == [
        ("transformer", "high_noise_model.safetensors", tuple(run.phases[0].times[:3])),
        ("transformer_2", "low_noise_model.safetensors", tuple(run.phases[0].times[2:])),
    ]
    for index, network in enumerate(("transformer", "transformer_2")):
        own = {name: value for name, value in run.expert_state(0).items() if name.startswith(f"{network}.")}
        read = student.expert_state(index)
        assert read.keys() == own.keys() and all(torch.equal(read[name], value) for name, value in own.items())
    right = pictures(run.folder, tmp_path / "run")
    assert len(set(right)) == 2 and pictures(folder, tmp_path / "export") == right


def test_it_is_served_as_its_run_is(made: Made) -> None:
    request = GenerationRequest(TEXT, 2, 5)
    right = asyncio.run(local_pipeline(serving(made.runs["qwen_image"].folder)).make(request))
    folder = made.exports["qwen_image", "diffusers"]
    pipeline = local_pipeline(serving(folder, layout="pipelined", teacher=True))
    card = pipeline.card()
    assert (card.export, card.name, len(card.steps)) == ("diffusers", "qwen_image-diffusers", 4)
    found = asyncio.run(pipeline.make(request))
    for one, other in zip(right.pictures, found.pictures, strict=True):
        assert abs(pixels(one) - pixels(other)).max() <= 1
    by_teacher = asyncio.run(pipeline.make(GenerationRequest(TEXT, 1, 5, "teacher")))
    assert abs(pixels(by_teacher.pictures[0]) - pixels(found.pictures[0])).max() > 1
    with api(made.exports["qwen_image", "lora"]) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/health").json()["export"] == http.get("/v1/models/tiny").json()["raydmd"]["export"] == "lora"


def test_whole_networks_are_compared_with_a_base_model_that_is_named(made: Made) -> None:
    folder, base = made.exports["wan-full", "diffusers"], str(made.root / "wan")
    with pytest.raises(UserError, match=r"^--teacher: export '.*' has the experts' networks alone; name .*--base"):
        local_pipeline(serving(folder, teacher=True))
    pipeline = local_pipeline(serving(folder, teacher=True, base=base))
    run = local_pipeline(serving(made.runs["wan-full"].folder, teacher=True))
    request = GenerationRequest(TEXT, 1, 5, "teacher", output_format="mp4", steps=2)
    assert asyncio.run(pipeline.make(request)).pictures == asyncio.run(run.make(request)).pictures


def edit(change: Callable[[dict], object], name: str = "export.json") -> Callable[[Path], object]:
    """Return what changes one of an export's JSON files."""

    def within(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        change(said)
        (folder / name).write_text(json.dumps(said))

    return within


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-8])


def other_numbers(folder: Path) -> None:
    file = folder / "phase-1.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    edit(lambda said: said["files"]["phase-1.safetensors"].update(bytes=file.stat().st_size))(folder)


NETWORK = "transformer_2/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
WRONG = [  # an export, what is done to it, the words of the one line
    ("qwen_image", "diffusers", edit(lambda s: s.update(shift=7.0), SCHEDULER), ["has shift 7.0, and export.json"]),
    ("wan-full", "diffusers", edit(lambda s: s.pop("shift"), SCHEDULER), ["has no shift", "another grid", "1, 0.9"]),
    ("wan", "diffusers", lambda folder: (folder / SCHEDULER).unlink(), [SCHEDULER, "No such file"]),
    ("qwen_image", "lora", lambda folder: (folder / "phase-2.safetensors").unlink(), ["phase-2", "No such file"]),
    ("qwen_image", "peft", lambda folder: shutil.rmtree(folder / "phase-1"), ["phase-1/adapter_", "No such file"]),
    ("qwen_image", "lightning", cut("low_noise_model.safetensors"), ["low_noise_model", "bytes", "it is not whole"]),
    ("wan-full", "diffusers", cut(NETWORK), [NETWORK, "bytes", "it is not whole"]),
    ("qwen_image", "lora", other_numbers, ["phase-1", "not the file of export.json", "other SHA-256"]),
    ("wan", "lora", edit(lambda s: s.update(version=2)), ["version 2", "reads 1", "install a newer raydmd"]),
    ("wan", "lora", edit(lambda s: s.pop("version")), ["version 0", "export the run again"]),
    ("wan", "lora", edit(lambda s: s.update(formt="x")), ["export.json", "unknown key 'formt'", "'format'"]),
    ("wan", "lora", edit(lambda s: s["experts"][1].update(times=[0.9, 0.0])), ["phase-1 ends at 0.75", "begins at"]),
    ("wan", "lora", edit(lambda s: s["experts"][0].update(times=[0.9, 0.75])), ["begin at 0.9", "at 1"]),
    ("wan", "lora", edit(lambda s: s["experts"][0].update(place="../x")), ["'../x' is not a path below"]),
    ("wan", "lora", edit(lambda s: s["adapter"].update(alpha=4.0)), ["alpha 8", "export.json says rank 4 and alpha 4"]),
    ("wan", "peft", edit(lambda s: s["adapter"].update(rank=2)), ["rank 4", "export.json says rank 2"]),
    ("wan", "lightning", edit(lambda s: s["adapter"].update(rank=2)), ["rank 4", "export.json says rank 2"]),
    ("wan", "lora", edit(lambda s: s["teacher"].update(path="/not/there")), ["for 'wan'", "/not/there", "by --base"]),
    ("wan", "lora", edit(lambda s: s["teacher"].update(family="wann")), ["no family 'wann'", "did you mean 'wan'"]),
    ("wan", "lora", edit(lambda s: s.update(fingerprint="0" * 32)), ["has other weights than 'wan'", "--base"]),
    ("wan", "lora", lambda folder: (folder / "export.json").write_text("{"), ["export.json is not readable"]),
    ("wan", "lora", lambda folder: (folder / "export.json").unlink(), ["no export.json", "export the run again"]),
    ("stable_diffusion", "diffusers", lambda folder: None, ["there is no text encoder"]),
]  # fmt: skip


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *command: str) -> None:
    assert cli.run(list(command)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(word in err for word in words), (words, err)


def test_an_export_that_was_changed_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (name, format, change, words) in enumerate(WRONG):
        folder = made.copy(name, format, tmp_path / f"{number}")
        change(folder)
        refused(words, capsys, "generate", str(folder), "--prompt", TEXT, "--out", str(tmp_path / "out"))
        if "other SHA-256" not in words:  # the replicas look at that
            refused(words, capsys, "serve", str(folder), "--config-out", str(tmp_path / "serve.yaml"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "serve.yaml").exists()


def test_a_folder_is_known_by_what_is_in_it(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--prompt", TEXT, "--out", str(tmp_path / "out"))
    teacher, run, lora = made.root / "wan", made.runs["wan"].folder, made.exports["wan", "lora"]
    family = build_family("ring")
    save_teacher(family.new_network(), tmp_path / "ring", "ring", family.options)  # type: ignore[attr-defined]
    for folder in (teacher, teacher / "transformer", tmp_path / "ring"):
        refused(["it is a teacher", "raydmd distill RECIPE --set teacher.path="], capsys, "generate", str(folder), *out)
        refused(["it is a teacher"], capsys, "serve", str(folder))
    (tmp_path / "nothing").mkdir()
    refused(["no run in", "and no export", "neither recipe.yaml nor export.json"], capsys, "generate",
            str(tmp_path / "nothing"), *out)  # fmt: skip
    refused(["did you mean 'wan-lora'"], capsys, "generate", str(made.root / "wan-lorra"), *out)
    for command in (["evaluate"], ["report"], ["export", "--format", "lora", "--out", str(tmp_path / "x")]):
        refused(["it is an export, which `raydmd generate` and `raydmd serve` take"], capsys, *command, str(lora))
    refused(["is a run, whose recipe names its teacher"], capsys, "generate", str(run), "--base", str(teacher), *out)
    full = made.exports["wan-full", "diffusers"]
    refused(["has all networks itself"], capsys, "generate", str(full), "--base", str(teacher), *out)
    refused(["--base /nowhere: no folder"], capsys, "generate", str(lora), "--base", "/nowhere", *out)
    refused(["--base", "QwenImage"], capsys, "generate", str(lora), "--base", str(made.root / "qwen_image"), *out)


def test_another_base_model_is_remarked_upon(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Path(shutil.copytree(made.root / "qwen_image", tmp_path / "tuned"))
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, {"format": "pt"})
    right = pictures(made.runs["qwen_image"].folder, tmp_path / "a")
    assert "other weights" not in capsys.readouterr().err
    assert pictures(made.exports["qwen_image", "lora"], tmp_path / "b", "--base", str(base)) != right
    assert "tuned has other weights than 'qwen_image' had" in capsys.readouterr().err


def test_export_json_holds_what_the_folder_needs(made: Made) -> None:
    for key, folder in made.exports.items():
        said = json.loads((folder / "export.json").read_text())
        assert (said["version"], said["format"], said["run"]) == (1, key[1], f"{key[0]}-run")
        path = said["teacher"].pop("path")
        assert path is None if key[1] == "diffusers" else path == str(made.root / RUNS[key[0]][0])
        assert str(made.root) not in json.dumps(said)
        assert set(said["files"]) <= {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_a_push_leaves_this_machines_path_out(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    folder = made.exports["qwen_image", "peft"]
    with upload_server() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        push(folder, "Someone/student")
    for name, content in hub.files.items():
        assert str(made.root).encode() not in content, name
        file = tmp_path / "fetched" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert set(hub.files) == {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    words = ("generate", str(tmp_path / "fetched"), "--prompt", TEXT, "--out", str(tmp_path / "out"))
    refused(["is of adapters for 'qwen_image': name its folder", "by --base"], capsys, *words)
    assert cli.run([*words, "--base", str(made.root / "qwen_image")]) == 0
