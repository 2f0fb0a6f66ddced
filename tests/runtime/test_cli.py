"""The commands as a user meets them: help, one line for each mistake, exit codes, files."""

import hashlib
import json
import secrets
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from PIL import Image
from run_folders import make_run

from raydmd import __version__
from raydmd.cli import app, run
from raydmd.cli.distill import next_commands
from raydmd.config.recipe import shipped_recipes
from raydmd.data.prompts import write_prompts
from raydmd.methods.loading import load_recipe, parse_recipe
from raydmd.runs.run import Run

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(app.commands)


@pytest.fixture(scope="module")
def trained(quick: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small finished run."""
    recipe = quick("digits", "evaluation.samples=60", "evaluation.batch=30", "teacher.steps=4")
    return make_run(recipe, tmp_path_factory.mktemp("cli") / "run", prompts("digits"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(arguments: list[str], capsys: Any) -> str:
    """Run a command that must end with 2 and one line; return the line."""
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("raydmd: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_can_be_run(name: str, capsys: Any) -> None:
    assert run([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"Usage: raydmd {name}")
    command = app.commands[name]
    assert command.help and command.epilog and command.epilog.startswith(f"Example: raydmd {name} ")
    assert " ".join(command.epilog.split()) in " ".join(out.split())
    _, name, *words = shlex.split(command.epilog.removeprefix("Example: "))
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
        assert command.help and command.epilog
    context = command.make_context(name, words)  # refuses options and values that are not there
    assert context.params
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def test_help_lists_the_commands(capsys: Any) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert {"quickstart", "pretrain", "distill", "evaluate", "generate", "report", "recipes"} <= set(COMMANDS)
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert run([]) == 2
    assert "Usage: raydmd" in "".join(capsys.readouterr())


WRONG = {
    "distil digits": ["distil"],
    "distill": ["RECIPE"],
    "distill digit": ["'digit'", "did you mean 'digits'?"],
    "distill digits more": ["more"],
    "distill digits --resum never": ["--resum", "--resume"],
    "distill digits --set": ["--set"],
    "distill digits --set seed": ["--set seed", "key.path=value"],
    "distill digits --set method.phazes=2": ["method.phazes", "did you mean 'phases'?"],
    "distill digits --set batch.size=0": ["batch.size", "greater than 0"],
    "distill digits --set method.name=phasd": ["method.name", "did you mean 'phased'?"],
    "distill digits --set method.steps=5": ["method.steps", "2 phases"],
    "distill digits --set iterations=[3]": ["iterations", "2 phases"],
    "distill digits --set teacher.path=nowhere": ["teacher.path", "nowhere"],
    "distill digits --set teacher.family=digts": ["teacher.family", "did you mean 'digits'?"],
    "distill digits --set teacher.options.wdth=3": ["teacher.options.wdth", "did you mean 'width'?"],
    "distill digits --set teacher.family=wan": ["teacher.path", "wan"],
    "distill digits --set prompts.path=nowhere.parquet": ["prompts", "nowhere.parquet"],
    "distill digits --resume nowhere": ["--resume nowhere"],
    "pretrain digit": ["did you mean 'digits'?"],
    "pretrain digits --set teacher.family=wan": ["teacher.family", "wan"],
    "pairs digit": ["did you mean 'digits'?"],
    "pairs digits": ["method.name", "'phased' needs no ODE pairs", "--count"],
    "pairs digits --count 0": ["--count", "0"],
    "pairs digits --count 9": ["teacher.path", "raydmd pretrain"],
    "pairs digits --count 9 --shard-size 300": ["--shard-size 300", "take 512"],
    "pairs digits --count 9 --set teacher.path=nowhere": ["teacher.path", "nowhere"],
    "distill digits-adp --set pairs.path=nowhere": ["pairs.path", "teacher.path"],
    "evaluate nowhere": ["nowhere", "recipe.yaml"],
    "report nowhere": ["nowhere", "recipe.yaml"],
    "report": ["RUN"],
    "generate nowhere --prompt 7": ["nowhere", "recipe.yaml"],
    "generate nowhere": ["--prompt, --prompts"],
    "generate nowhere --prompt 7 --prompts 7.txt": ["--prompt, --prompts"],
    "generate nowhere --prompts nowhere.txt": ["--prompts nowhere.txt", "No such file"],
    "generate nowhere --prompt 7 -n 0": ["-n", "0"],
    "recipes digit": ["did you mean 'digits'?"],
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_gets_one_line_and_nothing_is_written(words: str, here: Path, capsys: Any) -> None:
    line = refused(words.split(), capsys)
    assert all(part in line for part in WRONG[words]), line
    assert list(here.iterdir()) == []


def test_prompts_that_do_not_fit(here: Path, teachers: dict[str, Path], capsys: Any) -> None:
    write_prompts(here / "other.parquet", {"labels": np.arange(4)})
    write_prompts(here / "text.parquet", {"label": ["a", "b"]})
    write_prompts(here / "large.parquet", {"label": np.array([99, 1])})
    (here / "broken.parquet").write_text("not Parquet")
    before = contents(here)
    for name, words in {
        "other": ["no column 'label'", "did you mean 'labels'?"],
        "text": ["'label'"],
        "large": ["'label'", "99"],
        "broken": ["broken.parquet", "not a Parquet file"],
    }.items():
        teacher = f"teacher.path={teachers['digits']}"
        line = refused(["distill", "digits", "--set", teacher, "--set", f"prompts.path={name}.parquet"], capsys)
        assert all(word in line for word in words), line
    assert contents(here) == before


def test_places_that_cannot_be_written(here: Path, teachers: dict[str, Path], trained: Run, capsys: Any) -> None:
    (here / "file").write_text("a file")
    teacher = f"teacher.path={teachers['ring']}"
    for out in ("file", "file/below"):
        assert out in refused(["distill", "ring", "--set", teacher, "--out", out], capsys)
        assert out in refused(["pretrain", "ring", "--out", out], capsys)
        assert out in refused(["generate", str(trained.folder), "--prompt", "7", "--out", out], capsys)
    assert "file" in refused(["report", str(trained.folder), "--out", "file/below.html"], capsys)
    assert contents(here) == {"file": hashlib.sha256(b"a file").hexdigest()}
    line = refused(["pretrain", "ring", "--out", str(teachers["ring"])], capsys)
    assert "already holds a teacher" in line


def test_recipes_are_listed_and_printed_whole(capsys: Any) -> None:
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == sorted(shipped_recipes())
    for name in shipped_recipes():
        assert run(["recipes", name]) == 0
        assert parse_recipe(yaml.safe_load(capsys.readouterr().out), "printed") == load_recipe(name)


def test_generate_writes_the_same_pictures_for_the_same_seed(trained: Run, here: Path, capsys: Any) -> None:
    def made(out: str, *more: str) -> dict[str, str]:
        assert run(["generate", str(trained.folder), "--prompt", "7", "--out", out, *more]) == 0
        written = capsys.readouterr().out.split()
        assert sorted(Path(path).resolve() for path in written) == sorted((here / out).resolve().iterdir())
        return contents(here / out)

    first = made("a", "-n", "3", "--seed", "5")
    assert len(first) == 3 and all(name.endswith(".png") for name in first)
    for name in first:
        image = Image.open(here / "a" / name)
        assert image.width == image.height >= 8 and len(np.unique(np.asarray(image))) > 4
        sample = name.removesuffix(".png").split("-")[-1]
        assert image.text == {"prompt": "7", "seed": "5", "sample": sample, "model": trained.name}  # type: ignore[attr-defined]
    assert made("b", "-n", "3", "--seed", "5") == first
    other = made("c", "-n", "3", "--seed", "6")
    assert set(other.values()).isdisjoint(first.values())


@pytest.mark.parametrize("prompt", ["seven", "10", "-1", ""])
def test_generate_refuses_what_the_run_does_not_know(trained: Run, here: Path, capsys: Any, prompt: str) -> None:
    line = refused(["generate", str(trained.folder), "--prompt", prompt], capsys)
    assert f"--prompt {prompt}: " in line
    assert list(here.iterdir()) == []


def test_evaluate_and_report(trained: Run, here: Path, capsys: Any) -> None:
    folder = str(trained.folder)
    assert "49" in refused(["evaluate", folder, "--samples", "49"], capsys)
    assert run(["evaluate", folder]) == 0
    said = capsys.readouterr()
    shown = yaml.safe_load(said.out)
    assert [line.split(" (after")[0] for line in said.err.splitlines()] == [
        "evaluating: sampling the teacher", "evaluating: measuring the teacher", "evaluating: measuring the student",
    ]  # fmt: skip
    stored = json.loads((trained.folder / "evaluation.json").read_text())
    assert stored["samples"] == shown["samples"] == 60 and stored["method"] == "phased"
    assert shown["student"]["fd_teacher"] == pytest.approx(stored["student"]["fd_teacher"], abs=1e-4)
    assert run(["report", folder]) == 0
    said = capsys.readouterr()
    assert str((trained.folder / "report.html").resolve()) in said.out and said.err.startswith("reporting: ")
    page = (trained.folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "data:image/png;base64," in page
    assert 'src="http' not in page and 'href="http' not in page
    assert run(["report", folder, folder, "--out", "two.html"]) == 0
    assert (here / "two.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["distill", "digit"], 2, "did you mean 'digits'?"),
        (["distill", "ring", "--set", "method.phazes=2"], 2, "did you mean 'phases'?"),
        (["recipes"], 0, ""),
    ],
)
def test_exit_codes_of_the_process(arguments: list[str], code: int, words: str, here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from raydmd.cli import main; main()", *arguments],
        capture_output=True, text=True, cwd=here, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("\n") == (1 if code else 0) and bool(done.stdout) == (code == 0)
    assert list(here.iterdir()) == []


def joined(here: Path, teacher: Path, **environment: str) -> str:
    """Distil on the cluster that the environment names; it must end with 2 and one line: return the line."""
    done = subprocess.run(
        [sys.executable, "-c", "from raydmd.cli import main; main()", "distill", "ring", "--set",
         f"teacher.path={teacher}", "--out", "run"],
        capture_output=True, text=True, cwd=here, timeout=300,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(here), **environment},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("raydmd: RAY_ADDRESS")
    return done.stderr


def test_a_cluster_that_is_not_there(here: Path, teachers: dict[str, Path]) -> None:
    """RAY_ADDRESS names a port at which nobody listens, or nothing at all."""
    assert "127.0.0.1:9" in joined(here, teachers["ring"], RAY_ADDRESS="127.0.0.1:9")
    assert "Invalid address format: head" in joined(here, teachers["ring"], RAY_ADDRESS="head")


def test_a_cluster_whose_token_is_not_given(here: Path, teachers: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:  # Ray looks for the token before it asks anybody
        address = f"127.0.0.1:{head.getsockname()[1]}"
        line = joined(here, teachers["ring"], RAY_ADDRESS=address, RAY_AUTH_MODE="token")
    assert "no authentication token was found" in line


ANOTHER = """
import sys, raydmd.runtime, ray
ray.__version__ = "1.0.0"
print(ray.init("local", num_cpus=1, include_dashboard=False).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.mark.ray_private
def test_a_cluster_that_is_not_as_this_process_takes_it(here: Path, teachers: dict[str, Path]) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(here), **token}
    command, pipe = [sys.executable, "-c", ANOTHER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=here, env=environment) as head:
        try:
            assert head.stdout is not None
            address = head.stdout.readline().strip()
            loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # where that head is
            line = joined(here, teachers["ring"], RAY_ADDRESS=address, **loopback, **token)
            elsewhere = joined(here, teachers["ring"], RAY_ADDRESS=address, **token)  # Ray asks this node's address
            no_token = joined(here, teachers["ring"], RAY_ADDRESS=address, **loopback)
            another = token | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
            other_token = joined(here, teachers["ring"], RAY_ADDRESS=address, **loopback, **another)
        finally:
            head.communicate()  # at the end of its input it goes
    assert "Version mismatch" in line and "Ray: 1.0.0" in line
    assert address in elsewhere and "where Ray looks for it" in elsewhere
    assert no_token == other_token and f"{address}: the cluster demands a token" in no_token


@pytest.mark.parametrize(
    ("family", "overrides", "folder", "expected"),
    [
        ("digits", [], "runs/a", ["raydmd evaluate runs/a", "raydmd report runs/a"]),
        ("ring", [], "my runs/a", ["raydmd evaluate 'my runs/a'", "raydmd report 'my runs/a'"]),
        ("digits", ["evaluation.samples=10"], "a", ["raydmd report a"]),
        ("digits", ["teacher.family=wan", "teacher.path=wan"], "a", ["raydmd report a"]),
    ],
)
def test_only_next_commands_that_work_are_named(
    family: str, overrides: list[str], folder: str, expected: list[str]
) -> None:
    assert next_commands(load_recipe(family, overrides), Path(folder)) == expected
