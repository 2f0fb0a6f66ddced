"""The fenced blocks of the documentation, and what is held against them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

from raydmd.cli import app
from raydmd.errors import UserError
from raydmd.methods.loading import load_recipe, parse_recipe
from raydmd.serving.settings import load_serving

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
NOTE = re.compile(r"<!-- (.*?) -->\s*$", re.S)
INDENTED = re.compile(r"^    (?:\$ )?((?:raydmd|ray|python|pip) .*)$", re.M)
JOBS = {
    "jobs/distill.py": "distill",
    "jobs/pretrain.py": "pretrain",
    "jobs/pairs.py": "pairs",
    "jobs/encode.py": "encode",
}
RECIPES = ("distill", "pretrain", "pairs")  # commands whose --set is a recipe's
OTHERS = (  # programs of others: their options are not looked at
    "ray", "mkdocs", "ruff", "mypy", "pytest", "export", "printf", "docker", "kubectl", "prometheus", "bash", "cd",
    "curl", "ls", "source", ".",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, its text, and the comment right above it."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether no comment says why it is not."""
        return not self.note.startswith("not run")


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield a page's blocks in order."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        note = NOTE.search(text[: match.start()])
        line = text[: match.start()].count("\n") + 1
        yield Block(page, line, match[1], match[2], note[1] if note else "")


def indented_commands(page: Path) -> list[str]:
    """Return the command lines of a page that stand in indented blocks."""
    return INDENTED.findall(FENCE.sub("", page.read_text()))


def check_commands(text: str, recipe: str | None = None) -> int:
    """Parse shell lines: our own commands by their own parsers, of others only that their files and extras are there.

    Args:
        text: of the lines.
        recipe: stands for recipes that the page tells its reader to write.

    Returns:
        How many commands there were.

    Raises:
        click.ClickException, UserError, AssertionError: one that could not be run.
    """
    found = 0
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for words in _simple(line):
            found += 1
            _check(words, recipe)
    return found


def _simple(line: str) -> Iterator[list[str]]:
    """Yield the simple commands of a shell line: without comments, variables before them, and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token in ("&&", "||", "|", ";", "&"):
            while words and re.match(r"^\w+=", words[0]):
                words = words[1:]
            if words:
                yield words
            words = []
        elif words and words[-1] in (">", ">>", "2>"):
            words.pop()
        else:
            words.append(token)


def _check(words: list[str], recipe: str | None) -> None:
    program, *rest = words
    if program == "raydmd":
        _check_own(rest, recipe)
    elif program in ("python", "python3") and rest[:1] != ["-m"]:
        script = rest[0]
        if script in ("/opt/raydmd/jobs/distill.py",):
            script = script.removeprefix("/opt/raydmd/")
        assert (ROOT / script).is_file(), f"no file {script}"
        if script in JOBS:
            _check_own([JOBS[script], *rest[1:]], recipe)
    elif program.startswith("./"):
        assert (ROOT / program).is_file(), f"no file {program}"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            known = project["optional-dependencies"]
            assert set(extra.split(",")) <= set(known), f"no extra {extra}"
    elif program == "ray" and "--" in rest:
        _check(rest[rest.index("--") + 1 :], recipe)
    else:
        assert program in OTHERS or program == "python", f"unknown program {program}"


def _check_own(words: list[str], recipe: str | None) -> None:
    command: click.Command = app
    name = "raydmd"
    while isinstance(command, click.Group):
        assert words and words[0] in command.commands, f"no command {' '.join(words[:1])}"
        name, *words = words
        command = command.commands[name]
    values = command.make_context(name, list(words)).params
    overrides = [text for text in values.get("overrides") or ()]
    if name in RECIPES or (name == "encode" and values["recipe"]):
        given = values["recipe"] if not values["recipe"].endswith(".yaml") else recipe
        if given is not None:
            load_recipe(given, overrides, values["plugins"])
    if name == "serve" and "no_keys" in values:
        load_serving(str(values["folder"]), values["layout"], values["teacher"], values["fast"], overrides)


def check_recipe(text: str, source: str) -> None:
    """Validate a recipe, or a part of one, which is completed by the method that most have.

    Raises:
        UserError: what `raydmd validate` would say of its keys and values.
    """
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a mapping of keys is needed")
    parse_recipe({"name": "page", "method": {"name": "phased"}, **tree}, source)
