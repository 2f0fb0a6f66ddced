"""Checkpoints in an object store: the same promises, over S3's protocol, to a server on loopback."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, SMALL
from disturbed import head_alone
from mortal import Save, SaveExpert, at, dying_there, expert, is_of, killed_at, manifest, same, shards
from ports import free_ports
from pyarrow import fs
from rich.console import Console
from safetensors.torch import load_file

from raydmd.data.encoded_table import EncodedFacts, EncodedTable, file_content
from raydmd.data.prompt_files import read_prompt_texts
from raydmd.data.prompts import PromptTable
from raydmd.errors import RunError, StorageError, UserError
from raydmd.jsonl import read_lines
from raydmd.locations import absolute_location, parse_location
from raydmd.methods.loading import load_recipe
from raydmd.methods.local import train
from raydmd.runs.folders import expert_file
from raydmd.runs.run import Run
from raydmd.runtime.checkpoint import lock as locks
from raydmd.runtime.checkpoint import storage
from raydmd.runtime.checkpoint.lock import LOCK, Claim
from raydmd.runtime.checkpoint.manager import Archive, Found
from raydmd.runtime.checkpoint.shards import PIECE
from raydmd.runtime.launch import distill

SECRET = "wJalrXUtnFEMI/K7MDENG"


def environment() -> dict[str, str]:
    given = {"AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    return given | {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server that speaks S3 on loopback: its port."""
    (port,), log = free_ports(1), tmp_path_factory.mktemp("moto") / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as output:
        for name, value in environment().items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, log.read_text()
                    time.sleep(0.05)
            options = {"scheme": "http", "endpoint_override": f"127.0.0.1:{port}", "region": "us-east-1"}
            fs.S3FileSystem(**options, allow_bucket_creation=True).create_dir("bucket")
            yield port
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def uri(server: int, request: pytest.FixtureRequest) -> str:
    return at(server, request.node.name.replace("[", "-").replace("]", ""))


def contents(archive: Archive) -> list[str]:
    entries = archive.store.files.get_file_info(fs.FileSelector(archive.store.root, recursive=True))
    return sorted(entry.path.removeprefix(f"{archive.store.root}/") for entry in entries if entry.is_file)


def change(archive: Archive, path: str, edit: object) -> None:
    content = archive.store.read(path)
    archive.store.write(path, [edit(content)])  # type: ignore[operator]


def test_what_is_saved_comes_back_and_only_the_newest_are_kept(uri: str) -> None:
    archive = Archive(uri, keep=2)
    assert archive.newest() == Found(None, {}, []) and archive.peek() is None
    for step in (Save(2), Save(4), SaveExpert(0, 7), Save(6, (7,), edge=True), Save(8, (7,)), Save(8, (7,))):
        step(archive)
    again = Archive(uri)
    found = again.newest()
    assert is_of(found, 8, (7,)) and not found.skipped and again.peek() == found.manifest
    names = ["experts/phase-1.json", "step-000006.json", "step-000008.json"]
    assert contents(again) == sorted([*names, *(record["path"] for record in found.manifest.files.values())])
    Save(10, (7,))(again)
    assert is_of(archive.newest(), 10, (7,))


def test_small_texts(uri: str) -> None:
    archive = Archive(uri)
    assert archive.read_text("recipe.yaml") is None
    for text in ("name: é\n", "name: x\n"):
        archive.write_text("recipe.yaml", text)
        assert Archive(uri).read_text("recipe.yaml") == text


def test_a_shard_of_many_parts(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "AHEAD", PIECE)  # so that it waits for uploads in between
    big = {"w": np.random.default_rng(0).standard_normal(3 * PIECE // 4 + 5).astype(np.float32), "b": np.ones(3)}
    archive = Archive(uri)
    archive.save(manifest(3), {"generator": big})
    assert same(archive.newest().shards["generator"], big)


BREAKS = {
    "flipped": ("fake.safetensors", lambda content: content[:-7] + bytes([content[-7] ^ 1]) + content[-6:], "checksum"),
    "truncated": ("fake.safetensors", lambda content: content[:900], "900 bytes"),
    "emptied": ("generator.safetensors", lambda content: b"", "0 bytes"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_one_is_passed_over_and_said(what: str, uri: str) -> None:
    archive = Archive(uri)
    Save(4)(archive)
    Save(6)(archive)
    name, damage, why = BREAKS[what]
    change(archive, f"step-000006/{name}", damage)
    found = archive.newest()
    assert is_of(found, 4)
    (line,) = found.skipped
    folder = uri.partition("?")[0]
    assert line.startswith(f"checkpoint {folder}/step-000006.json is not whole and is skipped: ") and why in line
    assert "endpoint" not in line


def test_a_shard_gone_and_half_a_manifest(uri: str) -> None:
    archive = Archive(uri, keep=3)
    for iteration in (2, 4, 6):
        Save(iteration)(archive)
    archive.store.delete("step-000006/fake.safetensors")
    change(archive, "step-000004.json", lambda content: content[:50])
    assert archive.peek() == archive.newest().manifest
    found = archive.newest()
    assert is_of(found, 2) and len(found.skipped) == 2


REPEATED = Save(4, (7,), edge=True)
STORIES = {
    False: [Save(2), SaveExpert(0, 7), REPEATED, REPEATED, Save(6, (7,))],
    True: [Save(2), SaveExpert(0, 7), Save(4, (7,))],
}


@pytest.mark.parametrize("seen", STORIES)
def test_a_kill_at_any_operation_leaves_the_last_whole_checkpoint_or_the_one_before(
    seen: bool, server: int, tmp_path: Path
) -> None:
    """An upload that was cut short leaves no object; in the second round it does, as when Arrow closes on an error."""
    story, stages, skipped, last = STORIES[seen], set(), 0, 0
    while True:
        last += 1
        folder = f"killed-{seen}-{last}"
        died, done = killed_at(partial(dying_there, server, folder, seen), story, last, tmp_path / f"{last}.log")
        if not died:
            break
        before = [step for step in story[:done] if isinstance(step, Save)][-1:]
        found = Archive(at(server, folder)).newest()
        skipped += len(found.skipped)
        expected = {step.iteration: step for step in [*before, story[done]] if isinstance(step, Save)}
        if found.manifest is None:
            assert not before
        else:
            assert expected[found.manifest.iteration].is_there(found)
            stages.add((done, [*expected].index(found.manifest.iteration)))
        fresh = Archive(at(server, folder))  # the run goes on
        for step in (SaveExpert(0, 9), Save(8, (9,))):
            step(fresh)
        assert is_of(fresh.newest(), 8, (9,))
    assert {(len(story) - 1, 0), (len(story) - 1, 1)} <= stages and bool(skipped) == seen
    print(last - 1, "kills")


def test_one_driver_a_place(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No link and no exclusive creation there: who reads its own record back after a while has won."""
    monkeypatch.setattr(locks, "BEAT_S", 0.2)
    store, place = Archive(uri).store, [("checkpoint.path: there", uri)]

    def claimed(_: object) -> str | Claim:
        try:
            return Claim(place).__enter__()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(claimed, range(4)))
    (winner,) = [answer for answer in answers if isinstance(answer, Claim)]
    refused = [answer for answer in answers if isinstance(answer, str)]
    assert all(re.match(r"checkpoint\.path: there: another driver is at work on it", words) for words in refused)
    assert len(refused) == 3 and json.loads(store.read(LOCK))["owner"] == winner.owner
    first = store.modified([LOCK])
    end = time.monotonic() + 60
    while store.modified([LOCK]) == first:  # its heartbeat
        assert time.monotonic() < end
    record = json.loads(store.read(LOCK))
    store.write(LOCK, [json.dumps({**record, "owner": "another", "machine": "another"}).encode()])
    while winner.locks[0].lost is None:
        assert time.monotonic() < end
    with pytest.raises(StorageError, match="another driver has taken it over"):
        winner.check()
    winner.__exit__()
    assert isinstance(words := claimed(None), str) and "the same command goes on" in words  # not silent for long yet
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 0.5)
    time.sleep(2)  # the store tells whole seconds
    with Claim(place) as held:
        assert json.loads(store.read(LOCK))["owner"] == held.owner
    assert store.listing() == ([], [])


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server: one line that names the place and not the options, and never an empty archive."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (port,) = free_ports(1)
    with pytest.raises(UserError, match=r"^checkpoint\.path: s3://bucket/run cannot be read: "):
        Archive(at(port, "run")).newest()
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    archive = Archive(at(port, "run"))
    for call in (archive.newest, archive.peek, partial(archive.read_text, "x"), partial(archive.write_text, "x", "")):
        with pytest.raises(UserError, match=r"^checkpoint\.path: s3://bucket/run cannot be (read|written): ") as error:
            call()
        assert "\n" not in str(error.value) and SECRET not in str(error.value)
    for save in (partial(archive.save, manifest(3), shards(3)), partial(archive.save_expert, 0, expert(1))):
        with pytest.raises(RunError, match=r"^checkpoint\.path: s3://bucket/run cannot be written: "):
            save()


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(storage, "SILENCE", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        with pytest.raises(UserError, match=r"^checkpoint\.path: s3://bucket/run cannot be read: "):
            Archive(at(silent.getsockname()[1], "run")).newest()


def test_googles_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(storage, "SILENCE", 1.0)
    archive = Archive(f"gs://anonymous@bucket/run?endpoint_override=127.0.0.1:{free_ports(1)[0]}&scheme=http")
    for call, what in ((archive.newest, "read"), (partial(archive.write_text, "x", ""), "written")):
        with pytest.raises(UserError, match=rf"^checkpoint\.path: gs://bucket/run cannot be {what}: ") as error:
            call()
        assert "\n" not in str(error.value)


def test_a_bucket_that_is_not_there(server: int) -> None:
    missing = at(server, "run").replace("s3://bucket/", "s3://nobodys/")
    with pytest.raises(UserError, match=r"^checkpoint\.path: s3://nobodys/run cannot be written: "):
        Archive(missing).write_text("recipe.yaml", "")


# --- URIs

REFUSED = {
    "": "it is empty",
    "ftp://host/x": r"unknown scheme 'ftp' \(one of: file, s3, gs\)",
    "s4://bucket/x": "unknown scheme 's4'; did you mean 's3'",
    "S3:bucket/x": "a URI begins s3://",
    "file:/x": "a URI begins file://",
    "file://host/x": "a file URI is file:///absolute/folder",
    "s3://": "a bucket's name follows s3://",
    "s3:///x": "a bucket's name follows s3://",
    "gs://b\u00fccket/x": "a bucket's name follows gs://",
    "s3://bucket/../x": r"\. and \.\. mean nothing in s3://",
    "s3://bucket/a b": "spaces and # are written %20",
    "s3://bucket/a#b": "spaces and # are written %20 and %23",
    "s3://[bucket/x": "not readable as s3://",
    "s3://bucket/x?regoin=a": "unknown option 'regoin' of s3://; did you mean 'region'",
    "s3://bucket/x?region": "not readable as s3://",
    "gs://bucket/x?region=a": "unknown option 'region' of gs://",
    f"s3://who:{SECRET}@bucket/x": "a URI holds no credentials: they come from AWS_ACCESS_KEY_ID",
    f"s3://who:{SECRET.replace('/', '%2F')}@bucket/x": "a URI holds no credentials: they come from AWS_ACCESS_KEY_ID",
    f"s3://{SECRET.replace('/', '')}@bucket/x": "a URI holds no credentials",
    f"gs://{SECRET.replace('/', '')}@bucket/x": "a URI holds no credentials: .* GOOGLE_APPLICATION_CREDENTIALS",
    f"s3://bucket/x?secret_key={SECRET}": "a URI holds no credentials",
    f"s3://bucket/x?SessionToken={SECRET}": "a URI holds no credentials",
    f"s3://bucket/x?endpoint_override=http://who:{SECRET}@host": "a URI holds no credentials",
    f"s3://bucket/x?{SECRET}=": "an unknown option of s3://",
    f"who:{SECRET}@s3://bucket": "neither a path nor a URI",
}


@pytest.mark.parametrize("uri", REFUSED)
def test_a_bad_uri_is_refused_in_one_line_without_its_secrets(uri: str) -> None:
    for read in (Archive, parse_location, lambda path: load_recipe("ring", [f"checkpoint.path='{path}'"])):
        with pytest.raises(UserError, match=f"checkpoint\\.path: {REFUSED[uri]}") as error:
            read(uri)
        said = str(error.value)
        assert "\n" not in said and SECRET not in said and SECRET[:12] not in said and SECRET[-7:] not in said


@pytest.mark.parametrize(
    "override",
    [
        f"checkpoint=s3://who:{SECRET}@bucket",
        f"checkpoint.pth=s3://who:{SECRET}@bucket",
        f"checkpoint.path=[s3://who:{SECRET}@bucket]",
        f"checkpoint.path='s3://who:{SECRET}@bucket",
        f"checkpoint.path.x.y=s3://who:{SECRET}@bucket",
        f"checkpoint.path:s3://who:{SECRET}@bucket",
        f"checkpoint.path:s3://who:{SECRET}@bucket?region=x",
        f"checkpoint={{path: 's3://who:{SECRET}@bucket', evry: 1}}",
        f"checkpoint.secret_key={SECRET}",
    ],
)
def test_no_message_on_an_override_shows_a_secret(override: str) -> None:
    with pytest.raises(UserError, match=r"^--set checkpoint[.\w]*: ") as error:
        load_recipe("ring", ["checkpoint.path=runs/x"] * ("path.x" in override) + [override])
    assert "\n" not in str(error.value) and SECRET not in str(error.value)
    with pytest.raises(UserError, match="^--set seed=abc: .*got 'abc'"):  # another value is repeated
        load_recipe("ring", ["seed=abc"])


def test_a_good_uri() -> None:
    assert (
        parse_location("s3://b/x//y/?region=eu").path == "b/x/y"
        and str(parse_location("s3://b/x?region=e")) == "s3://b/x"
    )
    assert parse_location("gcs://anonymous@b").anonymous and not parse_location("gs://b").anonymous
    assert parse_location("runs/a:b") == parse_location("file:///x").__class__("file", "runs/a:b", {})
    assert load_recipe("ring").checkpoint.path is None
    assert load_recipe("ring", ["checkpoint.path=s3://b/x"]).checkpoint.path == "s3://b/x"
    for uri in ("s3://b/x", "file:///x", "gs://b"):
        assert absolute_location(uri) == uri
    assert absolute_location("runs/a:b") == f"{os.getcwd()}/runs/a:b"
    assert absolute_location("~/x") == str(Path.home() / "x")


@pytest.fixture(scope="module")
def here(server: int) -> Iterator[None]:
    """A Ray whose processes know the server's credentials."""
    with head_alone(4):
        yield


def test_a_new_head_goes_on_from_the_store(here: None, uri: str, prompts: Any, tmp_path: Path) -> None:
    """Stopped in the second phase; the same command with an empty folder gets the teacher that the run trained, and
    ends with the bits of an undisturbed run. After the end it gets the experts; then everything else works there, too.
    """
    quiet = Console(quiet=True)
    recipe = load_recipe(
        "ring", [*SMALL["ring"], "pretrain.iterations=20", *QUICK, "iterations=[5, 4]", "checkpoint.every=2"]
    )
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"path": uri})})
    folders = first, second, third = [tmp_path / name for name in ("first", "second", "third")]
    assert distill(recipe, first, console=quiet, until=8) is False
    saved = [e["iteration"] for e in read_lines(first / "events.jsonl") if e["event"] == "checkpoint"]
    assert saved == sorted(set(saved)) and saved[-1] == 8  # the last once, though the run stopped there
    assert not (first / "checkpoints").exists()
    with pytest.raises(UserError, match="checkpoint.path: it holds a run of another recipe .seed: 0 there, 1 here"):
        distill(recipe.model_copy(update={"seed": 1}), tmp_path / "other", console=quiet)
    with pytest.raises(UserError, match="checkpoint.path: it already holds a run"):
        distill(recipe, tmp_path / "other", resume="never", console=quiet)
    archive, config = Archive(uri), "teacher/config.json"
    kept = archive.store.read(config)
    archive.store.delete(config)
    with pytest.raises(UserError, match="lacks the teacher that the run trained") as error:
        distill(recipe, tmp_path / "other", console=quiet)
    assert "\n" not in str(error.value)
    archive.write_bytes(config, kept)

    assert distill(recipe, second, console=quiet) is True
    assert [e["resumed"] for e in read_lines(second / "events.jsonl") if "resumed" in e] == [8]
    assert not (second / "teacher/pretrain.jsonl").exists()
    run = Run(second)
    for index, weights in enumerate(train(recipe, run.family, run.teacher(), prompts("ring")).experts):
        found = load_file(expert_file(second, index))
        assert all(torch.equal(found[name], weights[name]) for name in weights)

    assert distill(recipe, third, console=quiet) is True
    assert not (third / "events.jsonl").exists()  # there was nothing to do
    for name in ("model.safetensors", "config.json"):
        assert len({(folder / "teacher" / name).read_bytes() for folder in folders}) == 1
    for index in range(2):
        assert expert_file(third, index).read_bytes() == expert_file(second, index).read_bytes()
    run = Run(third)
    assert len(run.trained_phases()) == 2 and run.experts(run.teacher())
    expert_file(third, 1).unlink()
    assert distill(recipe, third, console=quiet) is True and expert_file(third, 1).is_file()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(SECRET.encode() in content for content in written)


def test_texts_and_their_embeddings(server: int) -> None:
    """Texts are read from an object store, and a table is made, completed and read there."""
    place, texts = at(server, "table"), at(server, "texts.csv")
    files, path = fs.FileSystem.from_uri(texts)
    with files.open_output_stream(path) as stream:
        stream.write("caption\na fox\nein Füchschen\na wolf\n".encode())
    read = read_prompt_texts(texts)
    assert read is not None and read.texts == ["a fox", "ein Füchschen", "a wolf"]
    facts = EncodedFacts("f", "e", read.digest(), len(read), 2, ["x"])
    table = EncodedTable(place, facts, "--out")
    table.claim()
    for number, rows in enumerate(([0, 1], [2])):
        assert list(table.found()) == list(range(number))
        table.commit(number, file_content(facts, number, {"x": np.array(rows)}, 0))
    assert table.found() == {0: 0, 1: 0}
    assert PromptTable(place, ["x"]).take(np.array([2, 0]))["x"].tolist() == [2, 0]
    with pytest.raises(UserError, match="holds embeddings of something else"):
        EncodedTable(place, replace(facts, batch=3), "--out").claim()
    with pytest.raises(UserError, match="prompts.path: no file"):
        read_prompt_texts(at(server, "none.txt"))
