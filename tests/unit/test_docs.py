"""What the documentation tells its reader to type is what the code takes; its pages are built without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from documents import PAGES, ROOT, Block, blocks_of, check_commands, check_recipe, indented_commands

from raydmd.cli import run
from raydmd.errors import UserError

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
IN_STORY = ROOT / "docs" / "own-model.md"  # its blocks are run in order by tests/runtime/test_own_model.py
CHEAP = ("recipes", "validate")


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def own_recipe(page: Path, folder: Path) -> str | None:
    """Write the first recipe of a page that is a whole one; else the own model's."""
    for block in [*blocks_of(page), *blocks_of(IN_STORY)]:
        if block.language == "yaml" and {"teacher", "method"} <= {*re.findall(r"^(\w+):", block.text, re.M)}:
            (folder / "my.yaml").write_text(block.text)
            return str(folder / "my.yaml")
    return None


def test_there_are_blocks_of_each_kind() -> None:
    assert len(of("bash")) >= 15 and len(of("yaml")) >= 6 and len(of("python")) >= 5
    assert {block.language for block in BLOCKS} <= {"bash", "yaml", "python", "text"}


@pytest.mark.parametrize("block", of("bash"), ids=lambda block: block.name)
def test_command_lines_are_what_the_commands_take(block: Block, tmp_path: Path) -> None:
    assert check_commands(block.text, own_recipe(block.page, tmp_path)) >= 1


@pytest.mark.parametrize("page", [page for page in PAGES if indented_commands(page)], ids=lambda page: page.name)
def test_so_are_those_of_indented_blocks(page: Path, tmp_path: Path) -> None:
    for line in indented_commands(page):
        assert check_commands(line, own_recipe(page, tmp_path)) >= 1, line


@pytest.mark.parametrize("block", of("yaml"), ids=lambda block: block.name)
def test_recipes_are_valid(block: Block) -> None:
    check_recipe(block.text, block.name)


@pytest.mark.parametrize("block", of("python"), ids=lambda block: block.name)
def test_python_is_compiled_and_run(block: Block) -> None:
    code = compile(block.text, block.name, "exec")
    if block.is_run and block.page != IN_STORY:
        exec(code, {"__name__": "page"})


@pytest.mark.parametrize(
    "block", [block for block in of("bash") if block.is_run and block.page != IN_STORY], ids=lambda block: block.name
)
def test_commands_are_run(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Those without a reason not to are of the cheap ones."""
    for line in block.text.splitlines():
        words = line.split("#")[0].split()
        assert words[0] == "raydmd" and words[1] in CHEAP, f"run it, or say why not: <!-- not run: ... --> ({line})"
        files = [str(path) for word in words[2:] for path in (sorted(ROOT.glob(word)) if "*" in word else [word])]
        assert run([words[1], *files]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("raydmd distill digits --setting seed=1", click.ClickException),
        ("raydmd distil digits", AssertionError),
        ("raydmd distill digits --set method.phazes=2", UserError),
        ("raydmd distill digits --set method.adm.steps=2", UserError),
        ("raydmd distill digit --out runs/a", UserError),
        ("raydmd serve runs/a --set quue_seconds=3", UserError),
        ("raydmd serve runs/a --layout sideways", click.ClickException),
        ("raydmd evaluate runs/a && raydmd report", click.ClickException),
        ("ray job submit --working-dir . -- python jobs/distill.py digits --outt x", click.ClickException),
        ("python jobs/distil.py digits", AssertionError),
        ("pip install 'raydmd[servr]'", AssertionError),
        ("radmd recipes", AssertionError),
    ],
)
def test_a_wrong_command_line_is_found(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_commands(line)


@pytest.mark.parametrize(
    "text", ["batch: { sice: 8 }", "method: { name: fased }", "runtime: { faek: { gpus: 1 } }", "- 1"]
)
def test_a_wrong_recipe_is_found(text: str) -> None:
    with pytest.raises(UserError):
        check_recipe(text, "page")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """And its pages fetch nothing from elsewhere."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {path.stem for path in (ROOT / "docs").glob("*.md")}
    fetched = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["'](https?:)?//""")
    styles = sorted((tmp_path / "site").rglob("*.css"))
    assert styles
    for file in [*pages, *styles]:
        text = file.read_text()
        assert not fetched.search(text), file
        assert not re.search(r"""url\(["']?(https?:)?//""", text), file
    assert fetched.search('<link rel="stylesheet" href="https://fonts.example/css">')
    reference = (tmp_path / "site" / "reference.html").read_text()
    assert "subinterval" in reference and 'id="raydmd.methods.loading.load_recipe"' in reference


def test_pages_link_to_files_that_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCELESS.sub("", page.read_text())):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


FENCELESS = re.compile(r"^```.*?^```", re.M | re.S)
