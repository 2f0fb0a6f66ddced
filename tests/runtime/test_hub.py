"""Teachers of the hub: by name, revision and variant; from the cache; and a line where there is no network."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import COMMIT, HubServer, commit_of, hub_server, put_in_cache
from mortal import manifest
from ports import free_ports
from test_families_diffusers import SHAPES, rows
from test_teacher_folders import edit, new

from raydmd.cli import run as command
from raydmd.data.prompts import write_prompts
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe
from raydmd.models.diffusers import hub as hub_module
from raydmd.models.diffusers.hub import HubName, fetch, resolve_commit
from raydmd.models.diffusers.pretrained import PretrainedFamily
from raydmd.models.fingerprint import fingerprint_teacher
from raydmd.models.registry import build_family
from raydmd.runtime.checkpoint.manager import Archive
from raydmd.runtime.preparation import pin_teacher

NAME = "hf://Someone/tiny-wan"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return new(tmp_path_factory.mktemp("hub") / "wan", "wan")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an endpoint at which nobody listens."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    point_at(monkeypatch, f"http://127.0.0.1:{free_ports(1)[0]}")
    return tmp_path / "cache"


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        point_at(monkeypatch, server.endpoint)
        yield server


def family(path: str, **options) -> PretrainedFamily:
    made = build_family("wan", path, {"latent_shape": SHAPES["wan"], **options})
    assert isinstance(made, PretrainedFamily)
    return made


def arguments(path: str, tmp_path: Path) -> list[str]:
    prompts = write_prompts(tmp_path / "prompts.parquet", rows())
    options = json.dumps({"latent_shape": SHAPES["wan"]})
    sets = ["teacher.family=wan", f"teacher.path={path}", f"prompts.path={prompts}", f"teacher.options={options}"]
    return ["distill", "ring", *(word for each in sets for word in ("--set", each)), "--out", str(tmp_path / "run")]


def test_without_a_network_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    since = time.monotonic()
    assert command(arguments(NAME, tmp_path)) == 2
    assert time.monotonic() - since < 10
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"teacher.path: '{NAME}' is not in this machine's cache, and the hub at http://127" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", ["ANSWER_S", "LIMIT_S"])
def test_a_hub_that_never_answers_is_given_up(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a firewall does that drops all; and as a name server does, which no time limit of a request covers."""
    assert hub_module.ANSWER_S < hub_module.LIMIT_S < 10
    monkeypatch.setattr(hub_module, limit, 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        since = time.monotonic()
        with pytest.raises(UserError, match="does not answer"):
            family(NAME).check_teacher()
        assert time.monotonic() - since < 5


def test_offline_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in this machine's cache, and HF_HUB_OFFLINE"):
        family(NAME).check_teacher()


@pytest.mark.parametrize("offline", [False, True])
def test_the_cache_is_enough(wan: Path, cache: Path, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a revision and without one; a revision that is not there is not replaced by one that is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    put_in_cache(wan, cache, "Someone/tiny-wan", COMMIT)
    other = Path(shutil.copytree(wan, cache.parent / "other"))
    edit(other / "transformer/config.json", eps=1e-3)
    put_in_cache(other, cache, "Someone/tiny-wan", COMMIT[::-1], revision="v2")
    for name, commit in ((NAME, COMMIT), (f"{NAME}@main", COMMIT), (f"{NAME}@v2", COMMIT[::-1])):
        made = family(name)
        assert made.teacher_revision() == commit
        assert made.load_teacher().transformer.config.eps == (1e-3 if commit != COMMIT else 1e-6)
    assert not made.reads_text
    with pytest.raises(UserError, match=f"'{NAME}@v3' is not in this machine's cache"):
        family(f"{NAME}@v3").check_teacher()


def test_a_cache_that_lacks_something_is_refused(wan: Path, cache: Path) -> None:
    snapshot = put_in_cache(wan, cache, "Someone/tiny-wan", COMMIT)
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no weights"):
        family(NAME).check_teacher()


def test_what_is_needed_is_fetched_and_nothing_more(wan: Path, hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(wan, tmp_path / "model"))
    for name in ("README.md", "transformer/diffusion_pytorch_model.bin", "text_encoder/model.safetensors",
                 "transformer/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors",
                 "vae/config.json", "scheduler/scheduler_config.json"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    hub.models["Someone/tiny-wan", "main"] = folder
    teacher = family(NAME).load_teacher()
    assert torch.isfinite(teacher.transformer.proj_out.weight).all()
    assert hub.fetched() == {"model_index.json", "transformer/config.json", "vae/config.json", WEIGHTS,
                             "scheduler/scheduler_config.json"}  # fmt: skip
    print_of = fingerprint_teacher(family(NAME))
    assert print_of.endswith(f"@{commit_of(folder)}")
    pinned = f"{NAME}@{commit_of(folder)}"
    point_at(monkeypatch, f"http://127.0.0.1:{free_ports(1)[0]}")  # what is there needs no network, also by the commit
    assert fingerprint_teacher(family(pinned)) == fingerprint_teacher(family(NAME)) == print_of
    family(pinned).load_teacher()
    with pytest.raises(UserError, match="not whole, in this machine's cache, and the hub at"):
        fetch(HubName("Someone/tiny-wan", commit_of(folder)), ["vae/*"])


def test_revisions_and_variants(wan: Path, hub: HubServer, tmp_path: Path) -> None:
    half = new(tmp_path / "half", "wan", variant="fp16", max_shard_size="20KB")
    hub.models |= {("Someone/tiny-wan", "main"): wan, ("Someone/tiny-wan", "v2"): half}
    assert family(f"{NAME}@v2", variant="fp16").teacher_revision() == commit_of(half)
    family(f"{NAME}@v2", variant="fp16").load_teacher()
    assert WEIGHTS not in hub.fetched() and len([name for name in hub.fetched() if ".fp16-" in name]) > 2
    with pytest.raises(UserError, match="hub model 'Someone/tiny-wan' has no revision 'v3'"):
        family(f"{NAME}@v3").check_teacher()


def test_of_two_transformers_both_are_fetched_once_it_is_known_where_they_change_over(
    wan: Path, hub: HubServer, tmp_path: Path
) -> None:
    folder, second = Path(shutil.copytree(wan, tmp_path / "model")), WEIGHTS.replace("transformer", "transformer_2")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    edit(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=None)
    hub.models["Someone/tiny-wan", "main"] = folder
    with pytest.raises(UserError, match="two transformers"):
        family(NAME).check_teacher()
    assert not {WEIGHTS, second} & hub.fetched()
    told = Path(shutil.copytree(folder, tmp_path / "told"))
    edit(told / "model_index.json", boundary_ratio=0.9)
    hub.models["Someone/tiny-wan", "v2"] = told
    family(f"{NAME}@v2").load_teacher()
    assert {WEIGHTS, second} <= hub.fetched()
    assert {"config.json", "../transformer_2/config.json"} <= family(f"{NAME}@v2").teacher_files().keys()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "RepoNotFound", "no model 'Someone/tiny-wan' on the hub, or a private one"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (500, "", "the hub at .* does not answer"),
    ],
)
def test_what_the_hub_refuses_is_said(hub: HubServer, status: int, code: str, words: str) -> None:
    hub.refusals["Someone/tiny-wan"] = status, code
    with pytest.raises(UserError, match=words) as error:
        family(NAME).check_teacher()
    assert "\n" not in str(error.value)


def test_a_name_without_hf_gets_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen-Image", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Qwen/Qwen-Image@main"):
        with pytest.raises(UserError, match=f"no folder '{name}'; on the hub it is hf://{name}$"):
            family(name).check_teacher()
    with pytest.raises(UserError) as error:
        family("/mnt/models/wan").check_teacher()
    assert "hub" not in str(error.value)
    (tmp_path / "wan2.1_t2v.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file; the folder of a pipeline"):
        family("wan2.1_t2v.safetensors").check_teacher()


def test_a_run_keeps_its_commit(wan: Path, hub: HubServer, tmp_path: Path) -> None:
    """All workers get the commit, not a branch that may move; a run that is continued gets the one that it had."""
    hub.models["Someone/tiny-wan", "main"] = wan
    recipe = load_recipe("ring", ["teacher.family=wan", f"teacher.path={NAME}"])
    first = pin_teacher(recipe, tmp_path / "run")
    assert first.teacher.path == f"{NAME}@{commit_of(wan)}"
    record = manifest(1, seed=recipe.seed, teacher=f"0f@{COMMIT}")
    Archive(str(tmp_path / "run/checkpoints")).save(record, {})
    assert pin_teacher(recipe, tmp_path / "run").teacher.path == f"{NAME}@{COMMIT}"
    assert resolve_commit(HubName("Someone/tiny-wan", COMMIT)).revision == COMMIT  # without a question
